"""A published block and what must be left of it, and the one judgement that all of them pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from repconv_cli.graph.plan import count_ops
from tests.graph.models import randomised
from tests.graph.proof import TOLERANCE, difference, fused, is_unchanged, noise, snapshot

SMALL, OTHER = (2, 4, 7, 8), (3, 4, 10, 9)
ONE = (1, 0, 1)


@dataclass(frozen=True)
class Block:
    """A block, and what must be left of it: (convolutions, norms, operations). ``other`` is a second input shape."""

    name: str
    make: Callable[[], nn.Module]
    left: tuple[int, int, int]
    shape: tuple[int, ...] = SMALL
    other: tuple[int, ...] = OTHER
    blocks: int = 1


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def assert_fuses(block: Block) -> None:
    """Fail unless ``block`` becomes its stated operators, certified, computing the same, its module untouched."""
    module = randomised(block.make()).train()
    before = snapshot(module)
    found = fused(module, noise(block.shape))
    counts = count_ops(found.program)
    assert (counts["convs"], counts["norms"], counts["ops"]) == block.left
    assert len(found.certificates) == len(found.plan.blocks) == block.blocks
    assert all(certificate.error <= 1e-12 for certificate in found.certificates)
    assert is_unchanged(module, before)
    shape = _resizable(found.program, block.shape, block.other)
    assert shape[0] == block.other[0] != block.shape[0]
    assert difference(module, found.program, noise((3, *block.shape[1:]))) <= TOLERANCE
    assert difference(module, found.program, noise(shape, seed=1)) <= TOLERANCE
    assert difference(module, found.plan.program, noise(shape, seed=2)) <= TOLERANCE, "the source graph changed"


def assert_leaves(
    make: Callable[[], nn.Module],
    left: tuple[int, int, int],
    shape: tuple[int, ...],
    other: tuple[int, ...],
    *,
    is_spatial_free: bool = False,
) -> None:
    """Fail unless fusing leaves ``left``: (convolutions, norms, operations), and computes the same on ``other``."""
    module = randomised(make())
    found = fused(module, noise(shape), is_spatial_free=is_spatial_free)
    counts = count_ops(found.program)
    assert (counts["convs"], counts["norms"], counts["ops"]) == left, found.program.graph
    assert difference(module, found.program, noise(other, seed=1)) <= TOLERANCE


def _resizable(program: Any, shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``other`` where the program's sizes are free, else the size it is fixed to."""
    return tuple(
        new if free is None else old for free, old, new in zip(program.inputs[0].shape, shape, other, strict=True)
    )
