"""Operators that move values: padding, slices, splits, concatenation, constants written into the border."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from repconv_cli.algebra import Axis, ConvMap, Geometry
from repconv_cli.errors import InexactError
from repconv_cli.graph.arrange import PERMUTES, order_of
from repconv_cli.graph.rules.registry import Call, Step, aten, leaf_step, rule
from repconv_cli.graph.term import Leaf
from repconv_cli.graph.terms import (
    concatenate_terms,
    overwrite_term,
    permute_term,
    reshape_term,
    select_term,
)

_PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
# torch writes "to the end" as a very large index.
_END = 2**31


@rule(aten.pad.default)
def pad(call: Call) -> Step | None:
    """Padding is the delta kernel that reads outside; a value other than zero becomes a constant field."""
    return _pad(call, _PAD_MODES[call.operand(2, "mode", "constant")], call.operand(3, "value"))


@rule(aten.constant_pad_nd.default)
def constant_pad(call: Call) -> Step | None:
    """As ``pad`` with a constant."""
    return _pad(call, "zeros", call.operand(2, "value", 0))


def _pad(call: Call, mode: str, value: Any) -> Step | None:
    x, widths = call.variable(call.operand(0)), call.operand(1)
    if x is None or call.ndim < 3 or isinstance(value, fx.Node) or not all(isinstance(w, int) for w in widths):
        return None
    dims = call.ndim - 2
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]
    if len(pairs) > dims:
        raise InexactError("padding of the channel axis")
    pairs = [(0, 0)] * (dims - len(pairs)) + pairs[::-1]
    return _shift_step(x, tuple(Axis(1, 1, 1, low, high) for low, high in pairs), mode, float(value or 0.0))


def _shift_step(x: fx.Node, axes: tuple[Axis, ...], mode: str = "zeros", value: float = 0.0) -> Step:
    """Return the step of a pad, a crop or a subsampling: a kernel of one tap, somewhere else."""
    channels = x.meta["shape"][1]
    geometry = Geometry(channels, channels, channels, axes, mode)

    def make() -> ConvMap:
        ones = torch.ones(geometry.weight_shape, dtype=torch.float64)
        return ConvMap(ones, torch.zeros(channels, dtype=torch.float64), geometry)

    return leaf_step(x, Leaf(geometry, make, None, value, has_kernel=False, is_layer=False), 1, "")


@rule(aten.cat.default)
def concatenation(call: Call) -> Step | None:
    """Outputs side by side along the channels."""
    parts = [call.variable(part) for part in call.operand(0)]
    known = tuple(part for part in parts if part is not None)
    axis = call.operand(1, "dim", 0) % call.ndim
    if len(known) != len(parts) or axis == 0:
        return None
    return Step(known, lambda terms, anchor: concatenate_terms(terms, axis, anchor))


def _window(call: Call, first: int, size: int) -> tuple[int, int, int | None, int | None] | None:
    """Return (low, high, start, end) of a slice whose start is operand ``first``; None where a bound is computed."""
    start, end = call.operand(first, "start"), call.operand(first + 1, "end")
    if not all(v is None or isinstance(v, int) for v in (start, end)):
        return None
    low, high, _ = slice(start, end).indices(size)
    return low, max(low, high), start, end


@rule(aten.slice.Tensor)
def slice_tensor(call: Call) -> Step | None:
    """A slice of channels selects; of space, it crops or subsamples."""
    x, step = call.variable(call.operand(0)), call.operand(4, "step", 1)
    dim = call.operand(1, "dim", 0) % call.ndim
    window = None if x is None or dim == 0 else _window(call, 2, x.meta["shape"][dim])
    if x is None or window is None or not isinstance(step, int):
        return None
    low, high, start, end = window
    if dim == 1 and step == 1:
        return Step((x,), lambda terms, anchor: select_term(terms[0], low, high, 1, anchor))
    if dim == 1 or call.ndim < 3:
        return None
    if x.meta["free"][dim] and ((start or 0) < 0 or (end is not None and 0 <= end < _END)):
        return None  # a place counted from the other end moves with a free size
    crop = Axis(1, step, 1, -low, high - x.meta["shape"][dim])
    return _shift_step(x, tuple(crop if i == dim else Axis() for i in range(2, call.ndim)))


_SPLITS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default}


@rule(operator.getitem)
def split_part(call: Call) -> Step | None:
    """One part of a split along the channels selects."""
    source, index = call.operand(0), call.operand(1)
    if not isinstance(source, fx.Node) or source.target not in _SPLITS:
        return None
    split = Call(source, call.constants)
    x, sizes = split.variable(split.operand(0)), split.operand(1)
    axis = split.operand(2, "dim", 0) % call.ndim
    if x is None or axis not in (1, call.ndim - 1):
        return None
    if isinstance(sizes, (list, tuple)):
        start = sum(sizes[:index])
    else:
        width = sizes if source.target is aten.split.Tensor else -(-x.meta["shape"][axis] // sizes)
        start = index * width
    stop = start + call.node.meta["shape"][axis]
    return Step((x,), lambda terms, anchor: select_term(terms[0], start, stop, axis, anchor))


@rule(*PERMUTES)
def permute(call: Call) -> Step | None:
    """A map on each position's channels runs before its axes change places as well as after."""
    x = call.variable(call.operand(0))
    if x is None:
        return None
    order = order_of(call.node)
    return Step((x,), lambda terms, anchor: permute_term(terms[0], tuple(order), anchor))


@rule(
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)
def reshape(call: Call) -> Step | None:
    """A map on each position's channels runs before its other axes are merged as well as after."""
    x = call.variable(call.operand(0))
    if x is None:
        return None
    shape = tuple(zip(call.node.meta["shape"], call.node.meta["free"], strict=True))
    return Step((x,), lambda terms, anchor: reshape_term(terms[0], shape, anchor))


@rule(aten.slice_scatter.default)
def border_constant(call: Call) -> Step | None:
    """A constant written into the border, as blocks do that pad with their inner bias."""
    x, source = call.variable(call.operand(0)), call.operand(1)
    dim = call.operand(2, "dim", 0) % call.ndim
    if x is None or not call.is_constant(source) or dim < 2 or call.operand(5, "step", 1) != 1:
        return None
    window = _window(call, 3, x.meta["shape"][dim])
    if window is None:
        return None
    low, high, start, end = window
    is_from_far_end = (start or 0) > 0 or (end is not None and 0 <= end < _END and (start or 0) < 0)
    value = call.tensor(source)
    if (x.meta["free"][dim] and is_from_far_end) or value.ndim != call.ndim or bool((value != value[:1]).any()):
        return None
    return Step((x,), lambda terms, anchor: overwrite_term(terms[0], value[0], dim, slice(low, high), anchor))
