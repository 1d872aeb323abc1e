"""Plan, fuse, certify, rewrite, and prove the whole: a program in, a proven float64 program out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repconv_cli.algebra.slabs import LazyWeight, Weight
from repconv_cli.errors import InputError, UnprovenError
from repconv_cli.finite import is_finite, largest
from repconv_cli.graph.certificate import Certificate, certify
from repconv_cli.graph.interpret import run_side_by_side, running
from repconv_cli.graph.plan import Block, Plan, make_plan
from repconv_cli.graph.program import Program
from repconv_cli.graph.rewrite import Fusion, fuse_block, rewrite
from repconv_cli.memory import empty

Planner = Callable[[Mapping[tuple[str, str], str]], tuple[Plan, tuple[Fusion, ...]]]
"""Gives a plan and how to execute it, without the nodes and anchors (by name) that failed their proof."""

WHOLE_MODEL_LIMIT = 1e-11
# However much a model makes of the last bit, this is no rounding.
_MOST_SENSITIVE = 1e-8


class _BlockUnprovenError(UnprovenError):
    def __init__(self, block: Block, found: str) -> None:
        super().__init__(found)
        self.block = block


@dataclass(frozen=True)
class Fused:
    """A program with its blocks fused and proven; ``program`` holds the new tensors, cast last of all.

    ``float64_error`` is the largest difference of any output before that cast, relative to that output's range.
    """

    plan: Plan
    fusions: tuple[Fusion, ...]
    certificates: tuple[Certificate, ...]
    program: Program
    float64_error: float


class _Workshop:
    """Makes each block's tensors when the fused graph first reads them: proves them, and keeps them cast.

    So there are never more float64 kernels at once than one block's.
    """

    def __init__(self, plan: Plan, fusions: tuple[Fusion, ...], dtype: torch.dtype | None, seed: int) -> None:
        self.plan, self.dtype, self.seed = plan, dtype, seed
        self.owners = {key: fusion for fusion in fusions for key in fusion.keys}
        self.lifted = {lifted.key: lifted.node for lifted in plan.lifted}
        self.certificates: dict[str, Certificate] = {}
        self.unread: dict[str, Weight] = {}
        self.tensors: dict[str, Tensor] = {}

    def _dtype(self, fusion: Fusion) -> torch.dtype | None:
        """Return the type that a block's tensors are stored in: where the model has several, that of the block."""
        own: torch.dtype = fusion.block.node.meta["dtype"]
        return self.dtype if self.dtype is None or own == self.plan.program.dtype() else own

    def prove(self, fusion: Fusion) -> None:
        """Compute and certify one block."""
        made: dict[str, Weight] = {}
        dtype = self._dtype(fusion)
        cast: dict[str, Tensor] = {}
        constants = self.plan.analysis.constants

        def make() -> dict[str, Weight]:
            constants.forget()
            made.update(fusion.tensors())
            proven = dict(made)
            for key, tensor in made.items():
                if isinstance(tensor, LazyWeight):
                    # The proof reads all of it.
                    cast[key] = empty(tensor.shape, dtype or tensor.dtype)
                    proven[key] = tensor.casting(cast[key])
            return proven

        try:
            self.certificates[fusion.block.node.name] = certify(fusion, constants, self.seed, make)
        except UnprovenError as failure:
            raise _BlockUnprovenError(fusion.block, failure.found) from failure
        constants.forget()
        self.unread.update(made)
        cast |= {key: tensor.to(dtype or tensor.dtype) for key, tensor in made.items() if isinstance(tensor, Tensor)}
        self.tensors |= cast
        for key, tensor in cast.items():
            if not is_finite(tensor):
                raise _BlockUnprovenError(fusion.block, f"{key} has values that {_name(tensor.dtype)} cannot hold")

    def constant(self, key: str) -> Tensor:
        """Return a constant that is stored from now on."""
        node, constants = self.lifted[key], self.plan.analysis.constants
        value: Tensor = constants.value(node)
        constants.forget()
        dtype = node.meta["dtype"] if self.dtype or not value.is_floating_point() else value.dtype
        # A view would keep, and a file could not hold, the memory of all that it was taken from.
        self.tensors[key] = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return value

    def tensor(self, key: str) -> Weight:
        """Return a tensor of the fused graph, in float64 if it is new; a new one is given once."""
        if key in self.lifted:
            return self.constant(key)
        if key not in self.owners:
            return self.plan.program.tensors[key]
        if key not in self.unread:
            self.prove(self.owners[key])
        return self.unread.pop(key)


def fuse_program(
    program: Program,
    inputs: Iterable[tuple[Tensor, ...]],
    *,
    dtype: torch.dtype | None = None,
    only: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    is_worth: Callable[[Block], bool] | None = None,
    planner: Planner | None = None,
) -> Fused:
    """Return ``program`` with every block of its plan fused and certified, and proved as a whole on ``inputs``.

    The plan is all that can be fused (in blocks named as ``only`` says), or what ``planner`` gives.
    A block without a certificate is left as it is, and becomes a refusal. New tensors are cast to ``dtype`` last of
    all; None keeps them in float64. Raises :class:`UnprovenError` if the whole model in float64 shows a difference.
    """
    samples = list(inputs)
    with torch.no_grad(), running("the model"):
        expected = run_side_by_side(program, samples, lambda key: program.tensors[key])
    _require_finite(expected)
    unproven: dict[tuple[str, str], str] = {}
    while True:
        plan, fusions = planner(unproven) if planner is not None else _everything(program, only, unproven, is_worth)
        try:
            fused, found = _execute(plan, fusions, samples, dtype, seed, progress)
        except _BlockUnprovenError as failure:
            unproven[failure.block.node.name, failure.block.anchor.name] = failure.found
            continue
        error = range_difference(expected, found)
        if not error <= WHOLE_MODEL_LIMIT:
            _require_rounding(error, _sensitivity(program, samples, expected))
        return replace(fused, float64_error=error)


def _require_rounding(error: float, sensitivity: float) -> None:
    """Raise unless ``error`` is what rounding makes of a model that is as sensitive to it as that."""
    if not error <= sensitivity:
        raise UnprovenError(
            f"the fused model differs from the original by {error:.1e} of its range in float64",
            needed=f"at most {WHOLE_MODEL_LIMIT:.0e}",
            hint="Nothing was written. Please report this model.",
        )
    if error > _MOST_SENSITIVE:
        raise InputError(
            f"rounding in float64 alone changes its outputs by {sensitivity:.1e} of their range, so nothing is proven",
            needed="weights whose sums do not cancel; these may be damaged",
        )


def _require_finite(outputs: list[list[Any]]) -> None:
    """Raise :class:`InputError` where no output of the model has a finite value: nothing could be compared."""
    values = [value for row in outputs for value in row if isinstance(value, Tensor) and value.is_floating_point()]
    if sum(value.numel() for value in values) and not any(bool(torch.isfinite(value).any()) for value in values):
        raise InputError("every value that the model gives is NaN or infinite", needed="weights that give numbers")


def _everything(
    program: Program,
    only: str | None,
    unproven: Mapping[tuple[str, str], str],
    is_worth: Callable[[Block], bool] | None,
) -> tuple[Plan, tuple[Fusion, ...]]:
    plan = make_plan(program, only, unproven, is_worth)
    return plan, tuple(fuse_block(block) for block in plan.blocks)


def _execute(
    plan: Plan,
    fusions: tuple[Fusion, ...],
    samples: list[tuple[Tensor, ...]],
    dtype: torch.dtype | None,
    seed: int,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[Fused, list[list[Any]]]:
    """Return the fused program and its outputs in float64; every block is proved on the way."""
    fused = rewrite(plan, fusions)
    workshop = _Workshop(plan, fusions, dtype, seed)

    def tensor(key: str) -> Weight:
        if progress is not None and key in workshop.owners:
            progress(f"Proving {workshop.owners[key].block.name}", len(workshop.certificates), len(fusions))
        return workshop.tensor(key)

    with torch.no_grad():
        found = run_side_by_side(fused, samples, tensor)
        for fusion in fusions:
            if fusion.block.node.name not in workshop.certificates:
                workshop.prove(fusion)
    certificates = tuple(workshop.certificates[fusion.block.node.name] for fusion in fusions)
    read = dict.fromkeys(str(node.target) for node in fused.graph.nodes if node.op == "get_attr")
    own = plan.program.tensors
    tensors = {key: workshop.tensors[key] if key in workshop.tensors else own[key] for key in read}
    return Fused(plan, fusions, certificates, replace(fused, tensors=tensors), 0.0), found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sensitivity(program: Program, samples: list[tuple[Tensor, ...]], expected: list[list[Any]]) -> float:
    """Return what rounding alone may do to the outputs: what four to sixteen units in every last place do.

    Inputs and tensors are moved by them, up and down: behind an activation one of the two may show nothing. Some
    models (many layers of sampling at learned places) make of the last bit far more than 1e-11, and no rewrite can
    agree with them better than they do with themselves.
    """
    return max(range_difference(expected, _moved(program, samples, sign)) for sign in (4.0, -4.0))


def _moved(program: Program, samples: list[tuple[Tensor, ...]], sign: float) -> list[list[Any]]:
    """Return the outputs where each value is moved by ``sign`` times one to four units in its last place."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float64).eps

    def nudged(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        # Of different sizes, else two that cancel would move together.
        units = torch.randint(-4, 4, x.shape, generator=generator).double()
        return x.double() * (1 + sign * eps * (units + (units >= 0)))

    moved = [tuple(nudged(x) for x in leaves) for leaves in samples]
    with torch.no_grad():
        return run_side_by_side(program, moved, lambda key: nudged(program.tensors[key]))


def range_difference(expected: list[list[Any]], found: list[list[Any]]) -> float:
    """Return the largest difference of any output, relative to that output's range."""
    pairs = [pair for rows in zip(expected, found, strict=True) for pair in zip(*rows, strict=True)]
    return max((_relative(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()), default=0.0)


def _relative(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    if not (is_finite(before) and is_finite(after)):
        finite = torch.isfinite(before)
        if not torch.equal(finite, torch.isfinite(after)):
            return float("inf")
        before, after = before[finite], after[finite]
    spread, difference = largest(before), largest(after - before)
    return difference / spread if spread else difference
