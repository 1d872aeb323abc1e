"""Operators with a kernel: convolutions, linear layers, average pools."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from repconv_cli.algebra import Axis, ConvMap, Geometry, average_pool_map, conv_map, transposed_conv_map
from repconv_cli.algebra.convmap import padding_pairs
from repconv_cli.errors import InexactError
from repconv_cli.graph.rules.registry import Call, Step, aten, integers, kernel_name, leaf_step, rule
from repconv_cli.graph.term import Leaf


def _weight_and_bias(call: Call) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return (input, weight, bias) of a layer whose parameters are constants, else None."""
    x, weight, bias = call.variable(call.operand(0)), call.operand(1), call.operand(2, "bias")
    if x is None or not call.is_constant(weight) or not (bias is None or call.is_constant(bias)):
        return None
    return x, weight, bias


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def convolution(call: Call) -> Step | None:
    """A convolution with constant weight composes with what it reads."""
    found = _weight_and_bias(call)
    if found is None:
        return None
    x, weight, bias = found
    shape: tuple[int, ...] = weight.meta["shape"]
    dims = len(shape) - 2
    stride, dilation = integers(call.operand(3, "stride", 1), dims), integers(call.operand(5, "dilation", 1), dims)
    padding = call.operand(4, "padding", 0)
    widths = padding if isinstance(padding, str) else integers(padding, dims)
    if len(x.meta["shape"]) != len(shape) or stride is None or dilation is None or widths is None:
        return None
    pads = padding_pairs(widths, shape[2:], dilation)
    groups: int = call.operand(6, "groups", 1)
    axes = tuple(Axis(k, s, d, *p) for k, s, d, p in zip(shape[2:], stride, dilation, pads, strict=True))

    def make() -> ConvMap:
        return conv_map(call.weight(weight), stride=stride, padding=pads, dilation=dilation, groups=groups)

    geometry = Geometry(shape[0], shape[1] * groups, groups, axes)
    offset = None if bias is None else call.tensor(bias)
    leaf = Leaf(geometry, make, offset, stored=lambda: call.weight(weight))
    is_one_place = all(size == 1 for size in (*shape[2:], *x.meta["shape"][2:]))
    return leaf_step(x, leaf, 1, "linear" if is_one_place else kernel_name(shape[2:]))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(call: Call) -> Step | None:
    """A transposed convolution: a plain one at stride 1; otherwise it takes norms, scales and 1x1s after it."""
    found = _weight_and_bias(call)
    if found is None:
        return None
    x, weight, bias = found
    shape: tuple[int, ...] = weight.meta["shape"]
    names = (("stride", 3, 1), ("padding", 4, 0), ("output_padding", 5, 0), ("dilation", 7, 1))
    options: dict[str, Any] = {
        name: integers(call.operand(index, name, default), len(shape) - 2) for name, index, default in names
    }
    options["groups"] = call.operand(6, "groups", 1)
    if len(x.meta["shape"]) != len(shape) or any(value is None for value in options.values()):
        return None
    # The geometry alone, from a weight without memory.
    shadow = torch.empty(shape, device="meta", dtype=torch.float64)
    no_bias = torch.empty(shape[1] * options["groups"], device="meta", dtype=torch.float64)
    geometry = transposed_conv_map(shadow, no_bias, **options).geometry
    leaf = Leaf(
        geometry,
        lambda: transposed_conv_map(call.weight(weight), **options),
        None if bias is None else call.tensor(bias),
        transposes=True,
    )
    return leaf_step(x, leaf, 1, f"transposed {kernel_name(shape[2:])}")


@rule(aten.linear.default)
def linear(call: Call) -> Step | None:
    """A linear layer on the last axis is a convolution without spatial axes."""
    found = _weight_and_bias(call)
    if found is None or len(found[0].meta["shape"]) < 2 or len(found[1].meta["shape"]) != 2:
        return None
    x, weight, bias = found
    outputs, inputs = weight.meta["shape"]
    leaf = Leaf(
        Geometry(outputs, inputs),
        lambda: conv_map(call.weight(weight)),
        None if bias is None else call.tensor(bias),
        stored=lambda: call.weight(weight),
    )
    return leaf_step(x, leaf, len(x.meta["shape"]) - 1, "linear")


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def average_pool(call: Call) -> Step | None:
    """An average pool whose padding counts is a depthwise kernel of ``1 / k``."""
    x = call.variable(call.operand(0))
    dims = int(str(call.node.target).split("avg_pool")[1][0])
    if x is None or len(x.meta["shape"]) != dims + 2:
        return None
    kernel = integers(call.operand(1, "kernel_size"), dims)
    stride = integers(call.operand(2, "stride") or call.operand(1, "kernel_size"), dims)
    padding = integers(call.operand(3, "padding", 0), dims)
    if kernel is None or stride is None or padding is None:
        return None
    axes = tuple(Axis(k, s, 1, p, p) for k, s, p in zip(kernel, stride, padding, strict=True))
    _check_pool(call, x, axes)
    channels, divisor = x.meta["shape"][1], call.operand(6, "divisor_override")
    geometry = Geometry(channels, channels, channels, axes)
    leaf = Leaf(geometry, lambda: average_pool_map(channels, axes, divisor), is_layer=False)
    return leaf_step(x, leaf, 1, f"average {kernel_name(kernel)}")


def _check_pool(call: Call, x: fx.Node, axes: tuple[Axis, ...]) -> None:
    spatial = x.meta["shape"][2:]
    whole = tuple(axis.output_size(size) for axis, size in zip(axes, spatial, strict=True))
    if call.operand(4, "ceil_mode", False) and (any(x.meta["free"][2:]) or whole != call.node.meta["shape"][2:]):
        raise InexactError("average pool in ceil mode: windows past the border average fewer values")
    if any(axis.low for axis in axes) and not call.operand(5, "count_include_pad", True):
        raise InexactError("average pool that leaves padding uncounted averages fewer values at the border")
