"""One rule per ATen operator: how a node's term follows from the terms of the nodes it reads.

A rule returns a :class:`Step`, None where the operator is no affine map of its inputs, or raises
:class:`~repconv_cli.errors.InexactError` where it nearly is one, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import Axis, Geometry, average_pool_map, batch_norm_scale_and_shift, conv_map, scale_map
from repconv_cli.algebra.convmap import padding_pairs, transposed_conv_map
from repconv_cli.errors import InexactError
from repconv_cli.graph.interpret import Constants
from repconv_cli.graph.terms import (
    Anchor,
    Leaf,
    Term,
    add_terms,
    apply_leaf,
    concatenate_terms,
    overwrite_term,
    scale_term,
    select_term,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """The nodes whose terms a node's term is made of, and how."""

    inputs: tuple[fx.Node, ...]
    combine: Callable[[tuple[Term, ...], Anchor], Term]
    leaf: Leaf | None = None
    label: str = ""


Rule = Callable[[fx.Node, Constants], Step | None]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def describe(node: fx.Node, constants: Constants) -> Step | None:
    """Return the step of ``node``, or None where it is no affine map of one tensor."""
    found = RULES.get(node.target) if node.op == "call_function" else None
    if found is None or "shape" not in node.meta or len(node.meta["shape"]) < 2:
        return None
    step = found(node, constants)
    if step is None:
        return None
    # A cast in between would round; and only a tensor of known shape can be an anchor.
    if any(source.meta.get("dtype") != node.meta["dtype"] for source in step.inputs):
        return None
    return step


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def _variable(value: Any, constants: Constants) -> fx.Node | None:
    """Return ``value`` if it is a tensor node that depends on the input."""
    is_variable = isinstance(value, fx.Node) and value not in constants and "shape" in value.meta
    return value if is_variable else None


def _constant(value: Any, constants: Constants) -> Tensor | float | None:
    """Return the float64 value of a constant operand; None if it is none."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and value in constants:
        found = constants.value(value)
        return found if isinstance(found, Tensor) else float(found)
    return None


def _ndim(node: fx.Node) -> int:
    return len(node.meta["shape"])


def _leaf_step(x: fx.Node, leaf: Leaf, axis: int, label: str) -> Step:
    return Step((x,), lambda terms, anchor: apply_leaf(leaf, terms[0], axis, anchor), leaf, label)


def _ints(value: Any, dims: int) -> tuple[int, ...] | None:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, int) for v in values):
        return None
    return tuple(values * dims if len(values) == 1 else values)


def _kernel_name(kernel: tuple[int, ...]) -> str:
    return "×".join(map(str, kernel)) if kernel else "linear"


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution(node: fx.Node, constants: Constants) -> Step | None:
    """A convolution with constant weight: composes with what it reads."""
    x, weight = _variable(node.args[0], constants), node.args[1]
    if x is None or weight not in constants or _ndim(x) != len(weight.meta["shape"]):  # type: ignore[union-attr]
        return None
    bias = _argument(node, 2, "bias")
    if bias is not None and bias not in constants:
        return None
    shape = weight.meta["shape"]  # type: ignore[union-attr]
    dims = len(shape) - 2
    stride, dilation = _ints(_argument(node, 3, "stride", 1), dims), _ints(_argument(node, 5, "dilation", 1), dims)
    padding = _argument(node, 4, "padding", 0)
    assert stride is not None
    assert dilation is not None
    given = padding if isinstance(padding, str) else _ints(padding, dims)
    assert given is not None
    pads = padding_pairs(given, tuple(shape[2:]), dilation)
    groups = _argument(node, 6, "groups", 1)
    axes = tuple(Axis(k, s, d, *p) for k, s, d, p in zip(shape[2:], stride, dilation, pads, strict=True))
    geometry = Geometry(shape[0], shape[1] * groups, groups, axes)
    leaf = Leaf(
        geometry,
        lambda: conv_map(
            constants.value(weight),
            stride=stride,
            padding=pads,
            dilation=dilation,
            groups=groups,  # type: ignore[arg-type]
        ),
        None if bias is None else constants.value(bias),
    )
    return _leaf_step(x, leaf, 1, _kernel_name(tuple(shape[2:])))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(node: fx.Node, constants: Constants) -> Step | None:
    """A transposed convolution: a plain one at stride 1; otherwise it takes norms, scales and 1x1s after it."""
    x, weight = _variable(node.args[0], constants), node.args[1]
    if x is None or weight not in constants or _ndim(x) != len(weight.meta["shape"]):  # type: ignore[union-attr]
        return None
    bias = _argument(node, 2, "bias")
    if bias is not None and bias not in constants:
        return None
    shape = weight.meta["shape"]  # type: ignore[union-attr]
    dims = len(shape) - 2
    names = (("stride", 3, 1), ("padding", 4, 0), ("output_padding", 5, 0), ("dilation", 7, 1))
    options = {name: _ints(_argument(node, index, name, default), dims) for name, index, default in names}
    if any(value is None for value in options.values()):
        return None
    groups = _argument(node, 6, "groups", 1)

    def make() -> Any:
        return transposed_conv_map(constants.value(weight), groups=groups, **options)  # type: ignore[arg-type]

    # The geometry alone, from a weight without memory.
    shadow = torch.empty(shape, device="meta", dtype=torch.float64)
    geometry = transposed_conv_map(
        shadow,
        torch.empty(shape[1] * groups, device="meta").double(),
        groups=groups,
        **options,  # type: ignore[arg-type]
    ).geometry
    leaf = Leaf(geometry, make, None if bias is None else constants.value(bias))
    return _leaf_step(x, leaf, 1, f"transposed {_kernel_name(tuple(shape[2:]))}")


@rule(aten.linear.default)
def linear(node: fx.Node, constants: Constants) -> Step | None:
    """A linear layer on the last axis: a convolution without spatial axes."""
    x, weight = _variable(node.args[0], constants), node.args[1]
    bias = _argument(node, 2, "bias")
    if x is None or weight not in constants or (bias is not None and bias not in constants) or _ndim(x) < 2:
        return None
    outputs, inputs = weight.meta["shape"]  # type: ignore[union-attr]
    leaf = Leaf(
        Geometry(outputs, inputs),
        lambda: conv_map(constants.value(weight)),  # type: ignore[arg-type]
        None if bias is None else constants.value(bias),
    )
    return _leaf_step(x, leaf, _ndim(x) - 1, "linear")


@rule(aten.batch_norm.default)
def batch_norm(node: fx.Node, constants: Constants) -> Step | None:
    """A batch norm in eval mode: one scale and shift per channel, ``gamma / sqrt(var + eps)``."""
    x, gamma, beta, mean, var, is_training, _, eps = node.args[:8]
    if _variable(x, constants) is None:
        return None
    if is_training or mean is None or var is None:
        raise InexactError("batch norm over the batch's own statistics, not running ones: not a constant map")
    if not all(value is None or value in constants for value in (gamma, beta, mean, var)):
        return None

    def combine(terms: tuple[Term, ...], anchor: Anchor) -> Term:
        values = [None if value is None else constants.value(value) for value in (gamma, beta, mean, var)]  # type: ignore[arg-type]
        scale, shift = batch_norm_scale_and_shift(*values, float(eps))  # type: ignore[arg-type]
        return scale_term(terms[0], scale, shift, 1, anchor)

    return Step((x,), combine)  # type: ignore[arg-type]


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(node: fx.Node, constants: Constants) -> Step | None:
    """An average pool whose padding counts: a depthwise kernel of ``1 / k``."""
    x = _variable(node.args[0], constants)
    dims = 0 if x is None else _ndim(x) - 2
    if x is None or dims != int(str(node.target).split("avg_pool")[1][0]):
        return None
    kernel = _ints(node.args[1], dims)
    stride = _ints(_argument(node, 2, "stride", []) or node.args[1], dims)
    padding = _ints(_argument(node, 3, "padding", 0), dims)
    if kernel is None or stride is None or padding is None:
        return None
    axes = tuple(Axis(k, s, 1, p, p) for k, s, p in zip(kernel, stride, padding, strict=True))
    if _argument(node, 4, "ceil_mode", False) and tuple(
        axis.output_size(size) for axis, size in zip(axes, x.meta["shape"][2:], strict=True)
    ) != tuple(node.meta["shape"][2:]):
        raise InexactError("average pool in ceil mode: windows past the border average fewer values")
    if any(padding) and not _argument(node, 5, "count_include_pad", True):
        raise InexactError("average pool that leaves padding uncounted averages fewer values at the border")
    channels, divisor = x.meta["shape"][1], _argument(node, 6, "divisor_override")
    geometry = Geometry(channels, channels, channels, axes)
    leaf = Leaf(geometry, lambda: average_pool_map(channels, axes, divisor))
    return _leaf_step(x, leaf, 1, f"average {_kernel_name(kernel)}")


_PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(node: fx.Node, constants: Constants) -> Step | None:
    """Padding: the delta kernel that reads outside; a padded value other than zero becomes a constant field."""
    x = _variable(node.args[0], constants)
    is_general = node.target is aten.pad.default
    mode = _PAD_MODES[_argument(node, 2, "mode", "constant")] if is_general else "zeros"
    value = _argument(node, 3, "value") if is_general else _argument(node, 2, "value", 0)
    widths = node.args[1]
    if x is None or _ndim(x) < 3 or not all(isinstance(w, int) for w in widths):  # type: ignore[union-attr]
        return None
    if isinstance(value, fx.Node):
        return None
    dims = _ndim(x) - 2
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]  # type: ignore[index,arg-type]
    if len(pairs) > dims:
        raise InexactError("padding of the channel axis")
    pairs = [(0, 0)] * (dims - len(pairs)) + pairs[::-1]
    return _shift_step(x, tuple(Axis(1, 1, 1, low, high) for low, high in pairs), mode, float(value or 0.0))


def _shift_step(x: fx.Node, axes: tuple[Axis, ...], mode: str = "zeros", value: float = 0.0) -> Step:
    """A pad, a crop or a subsampling: one tap of one, somewhere else."""
    channels = x.meta["shape"][1]
    geometry = Geometry(channels, channels, channels, axes, mode)

    def make() -> Any:
        delta = scale_map(torch.ones(channels, dtype=torch.float64), dims=len(axes))
        return type(delta)(delta.weight, delta.bias, geometry)

    return _leaf_step(x, Leaf(geometry, make, None, value, is_convolution=False), 1, "")


@rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def add_or_subtract(node: fx.Node, constants: Constants) -> Step | None:
    """A sum or difference of two branches merges them; with a constant it shifts."""
    left, right = node.args[0], node.args[1]
    name = str(node.target)
    sign = 1 if "add" in name else -1
    if "rsub" in name:
        left, right = right, left
    alpha = _argument(node, 2, "alpha", 1)
    a, b = _variable(left, constants), _variable(right, constants)
    if alpha != 1 or (a is None and b is None):
        return None
    if a is not None and b is not None:
        if not a.meta["shape"] == b.meta["shape"] == node.meta["shape"]:
            return None
        return Step((a, b), lambda terms, anchor: add_terms(terms[0], terms[1], sign, anchor))
    variable = a if a is not None else b
    assert variable is not None
    split = _per_channel(right if a is not None else left, node, constants)
    if split is None or variable.meta["shape"] != node.meta["shape"]:
        return None
    axis, value = split
    scale, shift = (1.0, sign * value) if a is not None else (float(sign), value)
    return Step((variable,), lambda terms, anchor: scale_term(terms[0], scale, shift, axis, anchor))


@rule(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def scale(node: fx.Node, constants: Constants) -> Step | None:
    """A product with, or a quotient by, one constant per channel scales."""
    left, right = node.args[0], node.args[1]
    x = _variable(left, constants)
    is_quotient = "div" in str(node.target)
    if x is None and not is_quotient:
        x, right = _variable(right, constants), left
    split = None if x is None else _per_channel(right, node, constants)
    if x is None or split is None or x.meta["shape"] != node.meta["shape"]:
        return None
    axis, value = split
    if is_quotient and not bool(torch.as_tensor(value).all()):
        return None
    factor = 1.0 / value if is_quotient else value
    return Step((x,), lambda terms, anchor: scale_term(terms[0], factor, 0.0, axis, anchor))


def _per_channel(operand: Any, node: fx.Node, constants: Constants) -> tuple[int | None, Tensor | float] | None:
    """Return (channel axis, value) of a constant that varies along one axis at most, None if it is none."""
    value = _constant(operand, constants)
    if value is None or isinstance(value, float):
        return None if value is None else (None, value)
    shape = node.meta["shape"]
    full = value.reshape((1,) * (len(shape) - value.ndim) + tuple(value.shape))
    varying = [
        axis for axis, size in enumerate(full.shape) if size > 1 and bool((full != full.narrow(axis, 0, 1)).any())
    ]
    if not varying:
        return None, float(full.flatten()[0])
    axis = varying[0]
    if len(varying) > 1 or axis not in (1, len(shape) - 1) or full.dtype != torch.float64:
        return None
    index = tuple(slice(None) if i == axis else 0 for i in range(len(shape)))
    return axis, full[index].clone()


@rule(aten.neg.default)
def negate(node: fx.Node, constants: Constants) -> Step | None:
    """A negation scales by -1."""
    x = _variable(node.args[0], constants)
    return None if x is None else Step((x,), lambda terms, anchor: scale_term(terms[0], -1.0, 0.0, None, anchor))


@rule(aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.copy.default, aten.dropout.default)
def same_values(node: fx.Node, constants: Constants) -> Step | None:
    """A copy, or dropout in eval mode, changes nothing. (A cast does: the caller compares dtypes.)"""
    if node.target is aten.dropout.default and node.args[2]:
        raise InexactError("dropout in training mode")
    x = _variable(node.args[1] if node.target is aten.copy.default else node.args[0], constants)
    if x is None or x.meta["shape"] != node.meta["shape"]:
        return None
    return Step((x,), lambda terms, _: terms[0])


@rule(aten.cat.default)
def concatenation(node: fx.Node, constants: Constants) -> Step | None:
    """Outputs side by side along the channels."""
    parts = [_variable(part, constants) for part in node.args[0]]  # type: ignore[union-attr]
    dim = _argument(node, 1, "dim", 0)
    if any(part is None for part in parts) or dim not in (1, 1 - _ndim(node)):
        return None
    return Step(tuple(parts), concatenate_terms)  # type: ignore[arg-type]


@rule(aten.slice.Tensor)
def slice_tensor(node: fx.Node, constants: Constants) -> Step | None:
    """A slice of channels selects; of space, crops or subsamples."""
    x = _variable(node.args[0], constants)
    dim = _argument(node, 1, "dim", 0)
    start, end, step = _argument(node, 2, "start") or 0, _argument(node, 3, "end"), _argument(node, 4, "step", 1)
    if x is None or dim in (0, -_ndim(node)) or not all(v is None or isinstance(v, int) for v in (start, end, step)):
        return None
    dim %= _ndim(x)
    size = x.meta["shape"][dim]
    low = min(max(start + size if start < 0 else start, 0), size)
    high = size if end is None else min(max(end + size if end < 0 else end, low), size)
    if dim == 1 and step == 1:
        return Step((x,), lambda terms, anchor: select_term(terms[0], low, high, 1, anchor))
    if dim == 1 or _ndim(x) < 3:
        return None
    if x.meta["free"][dim] and (start < 0 or (end is not None and 0 <= end < 2**31)):
        return None  # a place counted from the other end moves with a free size
    axes = tuple(Axis(1, step, 1, -low, high - size) if i == dim else Axis() for i in range(2, _ndim(x)))
    return _shift_step(x, axes)


@rule(operator.getitem)
def split_part(node: fx.Node, constants: Constants) -> Step | None:
    """One part of a split along the channels selects."""
    source, index = node.args
    if not isinstance(source, fx.Node) or source.target not in _SPLITS:
        return None
    x = _variable(source.args[0], constants)
    dim = _argument(source, 2, "dim", 0)
    if x is None or dim not in (1, 1 - _ndim(x)):
        return None
    width = node.meta["shape"][1]
    sizes = source.args[1]
    if isinstance(sizes, (list, tuple)):
        start = sum(sizes[:index])  # type: ignore[misc,arg-type]
    else:
        whole = sizes if source.target is aten.split.Tensor else -(-x.meta["shape"][1] // sizes)  # type: ignore[operator]
        start = index * whole  # type: ignore[operator]
    return Step((x,), lambda terms, anchor: select_term(terms[0], start, start + width, 1, anchor))


_SPLITS = {aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default}


@rule(aten.slice_scatter.default)
def border_constant(node: fx.Node, constants: Constants) -> Step | None:
    """A constant written into the border, as blocks do that pad with their inner bias."""
    x, source = _variable(node.args[0], constants), node.args[1]
    dim, start, end, step = (
        _argument(node, i, n, d) for i, n, d in ((2, "dim", 0), (3, "start", None), (4, "end", None), (5, "step", 1))
    )
    if x is None or source not in constants or _ndim(x) < 3 or dim < 2 or step != 1:
        return None
    if not all(v is None or isinstance(v, int) for v in (start, end)):
        return None
    size = x.meta["shape"][dim]
    low, high, _ = slice(start, end).indices(size)
    counted_from_far_end = (start or 0) > 0 or (end is not None and 0 <= end < 2**31 and (start or 0) < 0)
    if x.meta["free"][dim] and counted_from_far_end:
        return None
    value = constants.value(source)  # type: ignore[arg-type]
    if not isinstance(value, Tensor) or value.ndim != _ndim(x) or bool((value != value[:1]).any()):
        return None
    return Step((x,), lambda terms, anchor: overwrite_term(terms[0], value[0], dim, slice(low, high), anchor))
