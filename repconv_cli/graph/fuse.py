"""Plan, fuse, certify, rewrite, and prove the whole: a program in, a proven float64 program out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repconv_cli.errors import UnprovenError
from repconv_cli.graph.certificate import Certificate, certify
from repconv_cli.graph.interpret import run_program
from repconv_cli.graph.plan import Plan, make_plan
from repconv_cli.graph.program import Program
from repconv_cli.graph.rewrite import Fusion, fuse_block, rewrite

WHOLE_MODEL_LIMIT = 1e-11


@dataclass(frozen=True)
class Fused:
    """A program with its blocks fused and proven; ``program``'s new tensors are float64.

    ``float64_error`` is the largest difference of any output, relative to that output's range.
    """

    plan: Plan
    fusions: tuple[Fusion, ...]
    certificates: tuple[Certificate, ...]
    program: Program
    float64_error: float

    def keys(self) -> frozenset[str]:
        """Return the keys of the tensors that fusing made."""
        return frozenset(key for fusion in self.fusions for key in fusion.tensors)

    def in_dtype(self, dtype: torch.dtype) -> Program:
        """Return the fused program with its new tensors in ``dtype``: the one cast, at the very end."""
        made = self.keys()
        tensors = {key: t.to(dtype) if key in made else t for key, t in self.program.tensors.items()}
        return replace(self.program, tensors=tensors)


def fuse_program(
    program: Program,
    inputs: Iterable[tuple[Tensor, ...]],
    *,
    only: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Fused:
    """Return ``program`` with every block of its plan fused and certified, and proved as a whole on ``inputs``.

    Raises :class:`UnprovenError` if any certificate, or the whole model in float64, shows a difference.
    """
    plan = make_plan(program, only)
    fusions, certificates = [], []
    for index, block in enumerate(plan.blocks):
        if progress is not None:
            progress(f"Fusing {block.name}", index, len(plan.blocks))
        fusion = fuse_block(block)
        certificates.append(certify(fusion, plan.analysis.constants, seed))
        fusions.append(fusion)
    fused = rewrite(plan, tuple(fusions))
    if progress is not None:
        progress("Proving the whole model in float64", 0, 0)
    error = range_difference(program, fused, inputs)
    if not error <= WHOLE_MODEL_LIMIT:
        raise UnprovenError(
            f"the fused model differs from the original by {error:.1e} of its range in float64",
            needed=f"at most {WHOLE_MODEL_LIMIT:.0e}",
            hint="Nothing was written. Please report this model.",
        )
    return Fused(plan, tuple(fusions), tuple(certificates), fused, error)


def range_difference(original: Program, fused: Program, inputs: Iterable[tuple[Tensor, ...]]) -> float:
    """Return the largest float64 difference of any output, relative to that output's range."""
    worst = 0.0
    with torch.no_grad():
        for leaves in inputs:
            for before, after in zip(run_program(original, leaves)[0], run_program(fused, leaves)[0], strict=True):
                if isinstance(before, Tensor) and before.is_floating_point():
                    worst = max(worst, _relative(before, after))
    return worst


def _relative(before: Tensor, after: Tensor) -> float:
    finite = torch.isfinite(before)
    if before.shape != after.shape or not torch.equal(finite, torch.isfinite(after)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    spread = float(before[finite].abs().max())
    difference = float((after - before)[finite].abs().max())
    return difference / spread if spread else difference
