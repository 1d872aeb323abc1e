"""When a file is wrong: which block is off first, and what that looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repconv_cli.graph.fuse import Fused
from repconv_cli.graph.program import Program

# Another machine may sum in another order before the one cast, which can move a value to its neighbour.
_ULPS = 4


@dataclass(frozen=True)
class Difference:
    """The first tensor that is off: its block (or its own key), what was expected and what was found."""

    block: str
    key: str
    expected: Tensor
    found: Tensor
    blocks_off: int
    blocks: int


def first_difference(fused: Fused, expected: Program, found: Program) -> Difference | None:
    """Return the first tensor of ``found`` that is not ``expected``'s, blocks first and in their order; else None."""
    by_block = [(fusion.block.name, key) for fusion in fused.fusions for key in fusion.tensors]
    made = {key for _, key in by_block}
    others = [(key, key) for key in expected.tensors if key not in made]
    off = [(name, key) for name, key in (*by_block, *others) if not _agree(expected.tensors[key], found.tensors[key])]
    if not off:
        return None
    name, key = off[0]
    blocks_off = len({block for block, tensor in off if tensor in made})
    return Difference(name, key, expected.tensors[key], found.tensors[key], blocks_off, len(fused.fusions))


def _agree(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    a, b = expected.double(), found.double()
    scale = a.abs().amax(tuple(range(1, a.ndim)), keepdim=True) if a.ndim > 1 else a.abs()
    return bool(((a - b).abs() <= _ULPS * torch.finfo(expected.dtype).eps * scale).all())


def looks_like(difference: Difference) -> str:
    """Return in words what is wrong with the first tensor that is off."""
    expected, found = difference.expected, difference.found
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return (
            f"{difference.key} is {tuple(found.shape)} {found.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
        )
    a, b = expected.double(), found.double()
    if not bool(torch.isfinite(b).all()):
        return f"{difference.key} holds {int((~torch.isfinite(b)).sum())} values that are not finite"
    if difference.blocks_off > 1 and difference.blocks_off == difference.blocks:
        return "every block differs: the file was made from other weights, or with another norm eps"
    factor = _common_factor(a, b)
    if factor is not None:
        return f"{difference.key} is {factor:.6g} times what it should be"
    if a.ndim > 2 and _is_identity_lost(a, b):
        return f"the identity branch was left out of {difference.block}"
    rows = (a - b).flatten(1).abs().amax(1) > 0 if a.ndim > 1 else (a - b).abs() > 0
    if a.ndim > 1 and torch.equal(a.flatten(1).sum(1).sort().values, b.flatten(1).sum(1).sort().values):
        return f"output channels of {difference.key} are in another order"
    return f"{int(rows.sum())} of {rows.numel()} output channels of {difference.key} differ"


def _common_factor(expected: Tensor, found: Tensor) -> float | None:
    norm = float((expected * expected).sum())
    if not norm:
        return None
    factor = float((expected * found).sum()) / norm
    return factor if bool(torch.isclose(factor * expected, found, rtol=1e-3, atol=0.0).all()) else None


def _is_identity_lost(expected: Tensor, found: Tensor) -> bool:
    """Whether only one tap differs, and of each output channel only one input channel."""
    taps = (expected - found).flatten(2).abs()
    changed = taps > 1e-6 * taps.max()
    is_one_tap = int(changed.any(0).any(0).sum()) == 1
    return is_one_tap and bool((changed.any(2).sum(1) <= 1).all())
