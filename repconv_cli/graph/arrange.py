"""``Layout``: which of the anchor's axes each axis of a node holds, after permutes and reshapes.

A map on the channels of each position does not care how the positions are arranged, so a term carries its
arrangement beside its kernel: ``((0, 1), (2,))`` is ``(B, N, C)`` flattened to ``(B * N, C)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from repconv_cli.errors import InexactError

aten = torch.ops.aten

Layout = tuple[tuple[int, ...], ...]
PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
# An operator, and what follows its first operand.
Move = tuple[Callable[..., Any], tuple[Any, ...]]
# An axis: its size at the traced example, and whether that is free.
Size = tuple[int, bool]
_ONE: Size = (1, False)


def order_of(node: fx.Node) -> list[int]:
    """Return, for each axis of a permute, a transpose or a ``t``, the axis of its input that it is."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = list(range(len(source.meta["shape"])))
    if node.target is aten.permute.default:
        return [order[axis] for axis in node.args[1]]  # type: ignore[union-attr, index]
    if len(order) < 2:
        return order
    # A ``t`` has no operands: it exchanges the two axes that there are.
    first: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim0", 0)
    second: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim1", 1)
    order[first], order[second] = order[second], order[first]
    return order


def scatters(order: Sequence[int]) -> bool:
    """Whether a permute to ``order`` moves its values one by one, as no simple copy or matrix transpose does.

    Where the last axis stays last, whole rows are copied. Where two runs of axes change places behind others that stay,
    it is the transpose of a batch of matrices. For any other order a runtime works out the place of each value, which
    takes longer than two of the former.
    """
    cuts = sum(after != before + 1 for before, after in pairwise((-1, *order)))
    return cuts > 2 and order[-1] != len(order) - 1


def unmoved(ndim: int) -> Layout:
    """Return the layout of the anchor itself."""
    return tuple((axis,) for axis in range(ndim))


def reshaped(layout: Layout, sizes: tuple[Size, ...], shape: tuple[Size, ...]) -> Layout:
    """Return the layout after a reshape to ``shape``; ``sizes`` are those of the axes that ``layout`` names.

    A reshape keeps the order of values, so each new axis must hold whole old ones in order. Axes of size 1 come and
    go. Raises :class:`InexactError` where an axis would be cut.
    """
    axes = [axis for group in layout for axis in group]
    spare = [axis for axis, size in enumerate(sizes) if size == _ONE and axis not in axes]
    found: list[tuple[int, ...]] = []
    for size in shape:
        while axes and sizes[axes[0]] == _ONE != size:
            spare.append(axes.pop(0))
        if size == _ONE and not (axes and sizes[axes[0]] == _ONE):
            found.append((spare.pop(spare.index(min(spare))),) if spare else ())
            continue
        group: list[int] = []
        held = 1
        while axes and (not group or held < size[0]):
            group.append(axes.pop(0))
            held *= sizes[group[-1]][0]
        if not group or held != size[0] or (len(group) == 1 and sizes[group[0]][1] != size[1]):
            raise InexactError("a reshape that cuts an axis")
        found.append(tuple(group))
    if any(sizes[axis] != _ONE for axis in axes):
        raise InexactError("a reshape that cuts an axis")
    return tuple(found)


def moves(layout: Layout, ndim: int) -> list[Move]:
    """Return the operators that bring a value of the anchor's axes there."""
    held = [axis for group in layout for axis in group]
    found: list[Move] = []
    dropped = [axis for axis in range(ndim) if axis not in held]
    if dropped:
        found.append((aten.squeeze.dims, (dropped,)))
    order = [sorted(held).index(axis) for axis in held]
    if order != sorted(order):
        found.append((aten.permute.default, (order,)))
    position = 0
    for group in layout:
        if len(group) > 1:
            found.append((aten.flatten.using_ints, (position, position + len(group) - 1)))
        position += bool(group)
    found.extend((aten.unsqueeze.default, (index,)) for index, group in enumerate(layout) if not group)
    return found
