"""The deploy form of weights: what their family's own deploy class loads, block by block.

Weights alone tell the kernels and the statistics, but no ``eps``, no stride and no activation: what cannot be told is
assumed, and listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repconv_cli.checkpoint.families.find import FamilyBlock, Found, find_blocks
from repconv_cli.checkpoint.families.modules import Eps
from repconv_cli.checkpoint.families.parts import Layer, Norm, leaves
from repconv_cli.checkpoint.families.recognise import family_of, nearest_family
from repconv_cli.checkpoint.families.shapes import Shapes, main_layer
from repconv_cli.checkpoint.families.words import assumptions, branches_of, kind_of
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.clock import Progress
from repconv_cli.errors import InputError
from repconv_cli.folding import Folded, Folder
from repconv_cli.results import BlockFacts, Change, Totals, Verification

_ARCH = "Give it with --arch file.py:callable (or timm:NAME, torchvision:NAME)."


@dataclass(frozen=True)
class Deployed:
    """Weights in deploy form: the family's blocks, each one convolution, and all other tensors as they were."""

    found: Found
    folded: tuple[Folded, ...]
    tensors: dict[str, Tensor]

    def key_map(self) -> dict[str, list[str]]:
        """Return the keys that went into each new key."""
        return {key: list(fold.block.sources) for fold in self.folded for key in fold.keys}

    def facts(self, shapes: Shapes) -> tuple[BlockFacts, ...]:
        """Return what is told of each block; ``shapes`` are those of the weights that it was made of."""
        return tuple(block_facts_alone(fold.block, fold.facts, shapes) for fold in self.folded if fold.facts)


def recognise(tensors: Mapping[str, Tensor]) -> Found:
    """Return the family of ``tensors`` and its blocks.

    Raises :class:`InputError` for an unknown one: what was seen, the nearest family and what it lacks.
    """
    family = family_of(tensors)
    if family is None:
        near = nearest_family(tensors)
        seen = ", ".join(f"{quoted(key)} {_shape(tensor)}" for key, tensor in list(tensors.items())[:4])
        raise InputError(
            f"it holds {len(tensors)} tensors and no graph, and its keys are of no known family ({seen}, …)",
            needed="the architecture that they belong to"
            + (f", or keys of a known family (the nearest: {near.name}, {listed(near.marks)})" if near else ""),
            hint=_ARCH,
        )
    return find_blocks(family, {key: tuple(tensor.shape) for key, tensor in tensors.items()})


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def deploy(
    found: Found,
    tensors: Mapping[str, Tensor],
    eps: Eps,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    keeps_float64: bool = False,
) -> Deployed:
    """Return ``tensors`` in deploy form: every block folded in float64 and proven, then cast once.

    There are never more float64 tensors than one block's at once, unless ``keeps_float64``.
    """
    folder = Folder(tensors, eps, seed)
    folded = []
    result = {key: tensors[key] for key in found.kept}
    with torch.no_grad():
        for index, block in enumerate(found.blocks):
            if progress is not None:
                progress(f"Proving {block.name}", index, len(found.blocks))
            fold = folder.fold(block)
            result |= {key: _cast(key, tensor, _dtype(block, tensors)) for key, tensor in fold.tensors.items()}
            folded.append(fold if keeps_float64 else replace(fold, tensors={}))
    return Deployed(found, tuple(folded), result)


def _dtype(block: FamilyBlock, tensors: Mapping[str, Tensor]) -> torch.dtype:
    return tensors[f"{main_layer(block.part).path}.weight"].dtype


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise InputError(f"tensor {quoted(key)} of the fused model is beyond what {dtype} can hold")
    return cast.contiguous()


def block_facts_alone(block: FamilyBlock, facts: BlockFacts, shapes: Shapes) -> BlockFacts:
    """Return what is told of a block whose surroundings are unknown: no multiply-accumulates."""
    branches = branches_of(block.part, shapes)
    return replace(
        facts,
        name=block.name,
        kind=kind_of(branches),
        branches=branches,
        sources=block.sources,
        target=f"{block.target}.weight",
        macs=Change(None, None),
    )


def partial(deployed: Deployed, eps: float | None) -> Verification:
    """Return the verdict on weights alone: each block is proven, the model as a whole cannot be."""
    return Verification(
        verdict="partial",
        passed=True,
        close=None,
        max_abs=None,
        max_rel=None,
        noise=None,
        ratio=None,
        limit=None,
        top1=None,
        float64=max((f.certificate.error for f in deployed.folded if f.certificate), default=0.0),
        assumptions=assumptions(deployed.found, eps),
        not_checked=("the outputs of the whole model: weights alone hold no graph (--arch gives it)",),
    )


def totals_alone(found: Found, tensors: Mapping[str, Tensor], after: Mapping[str, Tensor] | None = None) -> Totals:
    """Return the counts that can be told from tensors alone; operations and multiply-accumulates cannot."""
    norms = {leaf.path for block in found.blocks for leaf in leaves(block.part) if isinstance(leaf, Norm)}
    layers = [f"{leaf.path}.weight" for block in found.blocks for leaf in leaves(block.part) if isinstance(leaf, Layer)]
    merged = [f"{main_layer(block.part).path}.weight" for block in found.blocks]
    removed = sum(tensors[key].ndim > 2 for key in layers) - sum(tensors[key].ndim > 2 for key in merged)
    convs, all_norms = _convolutions(tensors), sum(key.endswith(".running_var") for key in tensors)
    params = None if after is None else _parameters(after)
    unknown = Change(None, None)
    return Totals(
        Change(convs, convs - removed),
        Change(all_norms, all_norms - len(norms)),
        unknown,
        Change(_parameters(tensors), params),
        unknown,
    )


def _convolutions(tensors: Mapping[str, Tensor]) -> int:
    """Return how many weights of convolutions there are, by their shapes."""
    return sum(key.endswith("weight") and tensor.ndim > 2 for key, tensor in tensors.items())


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(statistics))
