"""The deploy form of weights: what their family's own deploy class loads, block by block.

Weights alone tell the kernels and the statistics, but no ``eps``, no stride and no activation: what cannot be told is
assumed, and listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from repconv_cli.checkpoint.families.find import FamilyBlock, Found, find_blocks
from repconv_cli.checkpoint.families.modules import Eps
from repconv_cli.checkpoint.families.parts import Layer, Norm, leaves
from repconv_cli.checkpoint.families.recognise import family_of, nearest_family
from repconv_cli.checkpoint.families.shapes import Shapes, fused_shapes, main_layer
from repconv_cli.checkpoint.families.words import assumptions, branches_of, kind_of
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.clock import Progress
from repconv_cli.errors import InputError
from repconv_cli.finite import is_finite
from repconv_cli.folding import Folded, Folder
from repconv_cli.results import BlockFacts, Change, Drawing, Totals, Verification

_ARCH = "Give it with --arch file.py:callable (or timm:NAME, torchvision:NAME)."


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
    return find_blocks(family, shapes_of(tensors))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


class DeployForm(Mapping[str, Tensor]):
    """Weights in deploy form, made as they are read: a block is folded in float64, proven, and cast once.

    A block's tensors are given up once each was read, so there are never more than those of a few blocks; read again,
    they are made again. ``planned`` tells all shapes and types beforehand, ``folded`` what was proven so far, with its
    float64 tensors if ``keeps_float64``.
    """

    def __init__(
        self,
        found: Found,
        tensors: Mapping[str, Tensor],
        eps: Eps,
        seed: int = 0,
        progress: Progress | None = None,
        *,
        keeps_float64: bool = False,
        draw: bool = False,
    ) -> None:
        self.found, self.tensors, self.shapes = found, tensors, shapes_of(tensors)
        self.progress, self.keeps_float64 = progress, keeps_float64
        self.folder = Folder(tensors, eps, seed, draw=draw)
        self.owners: dict[str, FamilyBlock] = {}
        self.planned = {key: tensors[key].to("meta") for key in found.kept}
        for block in found.blocks:
            _require_real(block, tensors)
            new = {f"{block.target}.{name}": shape for name, shape in fused_shapes(block.part, self.shapes).items()}
            self.owners |= dict.fromkeys(new, block)
            self.planned |= {key: torch.empty(new[key], dtype=self._dtype(block), device="meta") for key in new}
        self.folds: dict[str, Folded] = {}
        self.unread: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.planned)

    def __len__(self) -> int:
        return len(self.planned)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.owners:
            return self.tensors[key]
        if key not in self.unread:
            self._make(self.owners[key])
        return self.unread.pop(key)

    @property
    def folded(self) -> tuple[Folded, ...]:
        """What was proven so far, in the file's order."""
        return tuple(self.folds[block.target] for block in self.found.blocks if block.target in self.folds)

    def keys_by_block(self) -> list[tuple[str, str]]:
        """Return each new key with the name of its block."""
        return [(block.name, key) for key, block in self.owners.items()]

    def key_map(self) -> dict[str, list[str]]:
        """Return the keys that went into each new key."""
        return {key: list(block.sources) for key, block in self.owners.items()}

    def facts(self) -> tuple[BlockFacts, ...]:
        """Return what is told of each block that was proven."""
        return tuple(block_facts_alone(fold.block, fold.facts, self.shapes) for fold in self.folded if fold.facts)

    def drawing(self) -> Drawing:
        """Return the pictures of the blocks that were proven; there is no graph."""
        pictures = tuple(fold.picture for fold in self.folded if fold.picture)
        return Drawing((), (), self.facts(), pictures)

    def worst_error(self) -> float:
        """Return the largest error of any certificate so far."""
        return max((fold.certificate.error for fold in self.folded if fold.certificate), default=0.0)

    def _make(self, block: FamilyBlock) -> None:
        if self.progress is not None:
            self.progress(f"Proving {block.name}", len(self.folds), len(self.found.blocks))
        with torch.no_grad():
            dtype = self._dtype(block)
            fold = self.folder.fold(block, None if self.keeps_float64 else dtype)
            self.unread |= {key: _cast(key, tensor, dtype) for key, tensor in fold.tensors.items()}
        self.folds[block.target] = fold if self.keeps_float64 else replace(fold, tensors={})

    def _dtype(self, block: FamilyBlock) -> torch.dtype:
        return self.tensors[f"{main_layer(block.part).path}.weight"].dtype


_REAL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _require_real(block: FamilyBlock, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`InputError` where a block holds what float64 arithmetic does not reproduce, such as int8 codes."""
    for key in block.sources:
        if tensors[key].dtype not in _REAL:
            raise InputError(
                f"block {quoted(block.name)}: tensor {quoted(key)} is {str(tensors[key].dtype).removeprefix('torch.')}",
                needed="weights in float16, bfloat16, float32 or float64",
                hint="Fuse the checkpoint first, and quantize what comes out.",
            )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    # What needs no cast was judged when it was read, or cast before.
    if cast is not tensor and not is_finite(cast):
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


def partial(found: Found, eps: float | None) -> Verification:
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
        float64=None,
        assumptions=assumptions(found, eps),
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
