"""When a file is wrong: which block is off first, and what that looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from repconv_cli.graph.fuse import Fused
from repconv_cli.graph.interpret import run_program
from repconv_cli.graph.program import Program
from repconv_cli.results import LargestError

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
    keys = [(fusion.block.name, key) for fusion in fused.fusions for key in fusion.keys]
    by_block = [(name, key) for name, key in keys if key in expected.tensors]
    return first_difference_by_key(by_block, expected.tensors, found.tensors)


def first_difference_by_key(
    by_block: Sequence[tuple[str, str]], expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Difference | None:
    """Return the first tensor that is off, those of blocks (given as name and key) first; None if all agree."""
    made = {key for _, key in by_block}
    others = [(key, key) for key in expected if key not in made]
    off = [(name, key) for name, key in (*by_block, *others) if not _agree(expected[key], found[key])]
    if not off:
        return None
    name, key = off[0]
    blocks_off = len({block for block, tensor in off if tensor in made})
    return Difference(name, key, expected[key], found[key], blocks_off, len({block for block, _ in by_block}))


def first_block_off(fused: Fused, expected: Program, found: Program, inputs: tuple[Tensor, ...]) -> str | None:
    """Return the first block whose output in ``found`` is not that in ``expected``, both run in float64."""
    makers = [_readers(program, fused) for program in (expected, found)]
    with torch.no_grad():
        values = [
            run_program(program, inputs, nodes.values())[1]
            for program, nodes in zip((expected, found), makers, strict=True)
        ]
    for fusion in fused.fusions:
        name = fusion.block.name
        if name not in makers[0] or name not in makers[1]:
            continue
        a, b = values[0][makers[0][name]], values[1][makers[1][name]]
        if a.shape != b.shape or not bool(((a - b).abs() <= 1e-9 * a.abs().max()).all()):
            return name
    return None


def _readers(program: Program, fused: Fused) -> dict[str, fx.Node]:
    """Return the node that reads each block's own tensors, by the block's name."""
    owner = {key: fusion.block.name for fusion in fused.fusions for key in fusion.keys}
    return {
        owner[str(source.target)]: node
        for node in program.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and str(source.target) in owner
    }


def _agree(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    a, b = expected.double(), found.double()
    scale = a.abs().amax(tuple(range(1, a.ndim)), keepdim=True) if a.ndim > 1 else a.abs()
    return bool(((a - b).abs() <= _ULPS * torch.finfo(expected.dtype).eps * scale).all())


def largest_error(difference: Difference) -> LargestError | None:
    """Return the value that is farthest off (one that is not finite first), None where shapes differ."""
    a, b = difference.expected, difference.found
    if a.shape != b.shape or not a.numel():
        return None
    apart = torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf)
    place = torch.unravel_index(apart.argmax(), apart.shape)
    index = tuple(int(axis) for axis in place)
    return LargestError(difference.key, index, float(a[index]), float(b[index]))


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
    factor = _common_factor(a, b, torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0)
    if factor is not None:
        return f"{difference.key} is {factor:.6g} times what it should be"
    if a.ndim > 2 and _is_identity_lost(a, b):
        return f"the identity branch was left out of {difference.block}"
    rows = (a - b).flatten(1).abs().amax(1) > 0 if a.ndim > 1 else (a - b).abs() > 0
    if a.ndim > 1 and _is_reordered(a.flatten(1), b.flatten(1)):
        return f"output channels of {difference.key} are in another order"
    return f"{int(rows.sum())} of {rows.numel()} output channels of {difference.key} differ"


def _is_reordered(expected: Tensor, found: Tensor) -> bool:
    """Whether ``found`` has the rows of ``expected`` in another order."""
    return sorted(expected.tolist()) == sorted(found.tolist())


def _common_factor(expected: Tensor, found: Tensor, eps: float) -> float | None:
    norm = float((expected * expected).sum())
    if not norm:
        return None
    factor = float((expected * found).sum()) / norm
    return factor if bool(torch.isclose(factor * expected, found, rtol=64 * eps, atol=0.0).all()) else None


def _is_identity_lost(expected: Tensor, found: Tensor) -> bool:
    """Whether only one tap differs, and of each output channel only its own input channel."""
    taps = (expected - found).flatten(2).abs()
    changed = taps > 1e-6 * taps.max()
    is_one_tap = int(changed.any(0).any(0).sum()) == 1
    own = torch.arange(expected.shape[0]) % expected.shape[1]
    is_own = torch.nn.functional.one_hot(own, expected.shape[1]).bool()
    return is_one_tap and torch.equal(changed.any(2), is_own)
