"""Translations of operators that move values: pads, slices, splits, concatenations, other arrangements."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from repconv_cli.graph.arrange import Size
from repconv_cli.onnx.arranging import arranged
from repconv_cli.onnx.call import OnnxCall
from repconv_cli.onnx.table import aten, is_floating, same, translates

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
# ONNX writes "to the end" as the largest number.
_END = 2**31 - 1


@translates("Pad")
def pad(call: OnnxCall) -> fx.Node | None:
    """A pad of the last axes."""
    x, shape = call.operand(0), call.shape()
    widths = call.numbers(1, "pads")
    mode = _PAD_MODES.get(call.attribute("mode", "constant"))
    if x is None or shape is None or widths is None or mode is None or not is_floating(x):
        return None
    ndim = len(shape)
    axes = [axis % ndim for axis in call.numbers(3) or ()] if call.has_operand(3) else list(range(ndim))
    count = len(axes)
    pairs = dict(zip(axes, zip(widths[:count], widths[count:], strict=True), strict=True))
    first = next((axis for axis in range(ndim) if pairs.get(axis, (0, 0)) != (0, 0)), ndim)
    if first == ndim:
        return call.emit(same, x)
    if mode != "constant":
        # torch pads the last one to three axes in these modes, and all of them.
        first = max(2, ndim - 3) if first >= 2 else first
    sides = [side for axis in reversed(range(first, ndim)) for side in pairs.get(axis, (0, 0))]
    if mode != "constant":
        return call.emit(aten.pad.default, x, sides, mode)
    value = call.attribute("value", 0.0)
    if call.has_operand(2):
        found = call.maker.value(call.operand(2))
        if found is None or found.numel() != 1:
            return None
        value = found.item()
    return call.emit(aten.pad.default, x, sides, "constant", float(value))


@translates("Concat")
def concatenation(call: OnnxCall) -> fx.Node | None:
    """Values side by side."""
    if not call.operands or not all(is_floating(operand) for operand in call.operands):
        return None
    return call.emit(aten.cat.default, list(call.operands), int(call.attribute("axis")))


@translates("Slice")
def slices(call: OnnxCall) -> fx.Node | None:
    """A slice along each of some axes."""
    x, shape = call.operand(0), call.shape()
    starts, ends = call.numbers(1, "starts"), call.numbers(2, "ends")
    if x is None or shape is None or starts is None or ends is None or not is_floating(x):
        return None
    has_axes = call.has_operand(3) or call.attribute("axes") is not None
    axes = call.numbers(3, "axes") if has_axes else list(range(len(starts)))
    steps = call.numbers(4) if call.has_operand(4) else [1] * len(starts)
    if axes is None or steps is None or any(step < 1 for step in steps):
        return None
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop = None if end >= _END else end
        x = call.emit(aten.slice.Tensor, x, axis % len(shape), start, stop, step)
    return x


@translates("Split")
def split(call: OnnxCall) -> tuple[fx.Node, ...] | None:
    """The parts of a split along one axis."""
    x, shape = call.operand(0), call.shape()
    if x is None or shape is None or not is_floating(x) or any(known is None for known in call.known):
        return None
    axis = int(call.attribute("axis", 0)) % len(shape)
    parts = [known for known in call.known if known is not None]
    sizes = [known.shape[axis] for known in parts]
    if x.meta["free"][axis] or sum(sizes) != shape[axis]:
        return None
    whole = call.maker.call(aten.split_with_sizes.default, (x, sizes, axis), None, call.module)
    return tuple(
        call.maker.call(operator.getitem, (whole, index), known, call.module) for index, known in enumerate(parts)
    )


@translates("Transpose")
def transpose(call: OnnxCall) -> fx.Node | None:
    """Axes in another order."""
    x, shape = call.operand(0), call.shape()
    if x is None or shape is None or not is_floating(x):
        return None
    order = call.attribute("perm") or list(reversed(range(len(shape))))
    return call.emit(aten.permute.default, x, [int(a) for a in order], free=tuple(x.meta["free"][a] for a in order))


@translates("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(call: OnnxCall) -> fx.Node | None:
    """Axes merged, cut, added or left out, whatever the operator is called: the shapes before and after tell.

    With several free sizes only axes merged whole, or of size 1, can be said without computing sizes.
    """
    x, known = call.operand(0), call.known[0]
    if x is None or known is None or not is_floating(x) or "shape" not in x.meta:
        return None
    if sum(known.free) <= 1:
        sizes = [-1 if free else size for size, free in zip(known.shape, known.free, strict=True)]
        return call.emit(aten.reshape.default, x, sizes, free=known.free)
    before = list(zip(x.meta["shape"], x.meta["free"], strict=True))
    wanted = list(zip(known.shape, known.free, strict=True))
    for target, args in _merges(before, len(known.shape)):
        if arranged(target, args, before) == wanted:
            return call.emit(target, x, *args, free=known.free)
    return None


def _merges(sizes: list[Size], after: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield operators that may lead to ``after`` axes."""
    before = len(sizes)
    if before == after:
        yield same, ()
    if after == before + 1:
        for axis in range(after):
            yield aten.unsqueeze.default, (axis,)
    if after == before - 1:
        for axis in range(before):
            if sizes[axis] == (1, False):
                yield aten.squeeze.dims, ([axis],)
    if after < before:
        for first in range(after):
            yield aten.flatten.using_ints, (first, first + before - after)


@translates("DepthToSpace")
def depth_to_space(call: OnnxCall) -> fx.Node | None:
    """Channels moved into positions, in torch's order."""
    if call.attribute("mode", "DCR") != "CRD" or not is_floating(call.operand(0)):
        return None
    return call.emit(aten.pixel_shuffle.default, call.operand(0), int(call.attribute("blocksize")))
