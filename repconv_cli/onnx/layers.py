"""Translations of operators with a kernel: convolutions, linear layers, pools."""

from __future__ import annotations

from torch import fx

from repconv_cli.onnx.call import OnnxCall
from repconv_cli.onnx.table import aten, is_floating, translates

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
_AVERAGES = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
_MAXIMA = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}

Pairs = list[tuple[int, int]]


def _per_axis(call: OnnxCall, name: str, dims: int) -> list[int]:
    found = call.attribute(name) or [1] * dims
    if len(found) != dims:
        raise ValueError(name)
    return [int(value) for value in found]


def padding(call: OnnxCall, kernel: list[int], strides: list[int], dilations: list[int]) -> Pairs | None:
    """Return (low, high) per axis; None where it depends on a size that is free."""
    dims = len(kernel)
    mode = call.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        given = call.attribute("pads") or [0] * (2 * dims)
        return list(zip(given[:dims], given[dims:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * dims
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return None
    x = call.operand(0)
    assert x is not None
    pairs = []
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        if x.meta["free"][axis] and stride > 1:
            return None
        size = x.meta["shape"][axis]
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        low = total // 2 if mode == "SAME_UPPER" else total - total // 2
        pairs.append((low, total - low))
    return pairs


def padded(call: OnnxCall, x: fx.Node, pairs: Pairs, value: float = 0.0) -> fx.Node:
    """Return ``x`` padded with one value, by an operator of its own."""
    widths = [side for pair in reversed(pairs) for side in pair]
    return call.emit(aten.pad.default, x, widths, "constant", value)


@translates("Conv")
def convolution(call: OnnxCall) -> fx.Node | None:
    """A convolution; what its two sides are padded with differently, a pad does before it."""
    x, weight, bias = (call.operand(index) for index in range(3))
    shape = call.shape(1)
    if x is None or shape is None or not 3 <= len(shape) <= 5:
        return None
    dims = len(shape) - 2
    strides, dilations = _per_axis(call, "strides", dims), _per_axis(call, "dilations", dims)
    pairs = padding(call, list(shape[2:]), strides, dilations)
    if pairs is None:
        return None
    symmetric = [low for low, high in pairs if low == high >= 0]
    if len(symmetric) < dims:
        x, symmetric = padded(call, x, pairs), [0] * dims
    group = int(call.attribute("group", 1))
    return call.emit(_CONVOLUTIONS[dims], x, weight, bias, strides, symmetric, dilations, group)


@translates("ConvTranspose")
def transposed_convolution(call: OnnxCall) -> fx.Node | None:
    """A transposed convolution whose padding is plain."""
    shape = call.shape(1)
    is_plain = call.attribute("auto_pad", "NOTSET") == "NOTSET" and call.attribute("output_shape") is None
    if shape is None or not is_plain or not 3 <= len(shape) <= 5:
        return None
    dims = len(shape) - 2
    pads = call.attribute("pads") or [0] * (2 * dims)
    if pads[:dims] != pads[dims:]:
        return None
    strides, dilations = _per_axis(call, "strides", dims), _per_axis(call, "dilations", dims)
    more = call.attribute("output_padding") or [0] * dims
    operands = [call.operand(index) for index in range(3)]
    group = int(call.attribute("group", 1))
    return call.emit(_TRANSPOSED[dims], *operands, strides, pads[:dims], more, group, dilations)


@translates("AveragePool")
def average_pool(call: OnnxCall) -> fx.Node | None:
    """An average pool. Padding that counts and differs between the sides is a pad before it."""
    x, kernel = call.operand(0), call.attribute("kernel_shape")
    if x is None or kernel is None or len(kernel) not in _AVERAGES:
        return None
    dims = len(kernel)
    strides, dilations = _per_axis(call, "strides", dims), _per_axis(call, "dilations", dims)
    pairs = padding(call, kernel, strides, dilations)
    if pairs is None or any(d != 1 for d in dilations):
        return None
    is_ceil, counts = bool(call.attribute("ceil_mode", 0)), bool(call.attribute("count_include_pad", 0))
    low = [pair[0] for pair in pairs]
    is_torch = all(a == b <= k // 2 for (a, b), k in zip(pairs, kernel, strict=True))
    if not is_torch:
        if not counts or is_ceil:
            return None
        x, low = padded(call, x, pairs), [0] * dims
    return call.emit(_AVERAGES[dims], x, kernel, strides, low, is_ceil, counts)


@translates("MaxPool")
def max_pool(call: OnnxCall) -> fx.Node | None:
    """A max pool, to be run alone."""
    kernel = call.attribute("kernel_shape")
    if kernel is None or len(kernel) not in _MAXIMA or len(call.node.output) > 1:
        return None
    dims = len(kernel)
    strides, dilations = _per_axis(call, "strides", dims), _per_axis(call, "dilations", dims)
    pairs = padding(call, kernel, strides, dilations)
    if pairs is None or any(low != high for low, high in pairs):
        return None
    low, is_ceil = [pair[0] for pair in pairs], bool(call.attribute("ceil_mode", 0))
    return call.emit(_MAXIMA[dims], call.operand(0), kernel, strides, low, dilations, is_ceil)


@translates("Gemm")
def general_product(call: OnnxCall) -> fx.Node | None:
    """``alpha * A B + beta * C``: a linear layer, its factors taken into constants."""
    x, weight, bias = (call.operand(index) for index in range(3))
    shape = call.shape(1)
    if x is None or weight is None or shape is None or call.attribute("transA", 0):
        return None
    if not call.attribute("transB", 0):
        weight, shape = call.emit(aten.t.default, weight), shape[::-1]
    alpha, beta = float(call.attribute("alpha", 1.0)), float(call.attribute("beta", 1.0))
    if alpha != 1.0:
        weight = call.emit(aten.mul.Tensor, weight, alpha)
    if bias is None:
        return call.emit(aten.linear.default, x, weight)
    if beta != 1.0:
        bias = call.emit(aten.mul.Tensor, bias, beta)
    added: tuple[int, ...] = bias.meta["shape"]
    if added == (1, shape[0]):
        bias = call.emit(aten.reshape.default, bias, [shape[0]])
    elif added != (shape[0],):
        return call.emit(aten.add.Tensor, call.emit(aten.linear.default, x, weight), bias)
    return call.emit(aten.linear.default, x, weight, bias)


@translates("MatMul")
def matrix_product(call: OnnxCall) -> fx.Node | None:
    """A product with a constant matrix is a linear layer; with anything else, a product."""
    x, weight = call.operand(0), call.operand(1)
    left, right = call.shape(0), call.shape(1)
    if not is_floating(x) or not is_floating(weight) or left is None or right is None:
        return None
    if weight in call.maker.constants and len(right) == 2 and len(left) >= 2:
        assert weight is not None
        return call.emit(aten.linear.default, x, call.emit(aten.t.default, weight))
    return call.emit(aten.matmul.default, x, weight)
