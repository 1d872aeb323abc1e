"""The kinds of layers that a net may have, each written as the ATen calls that torch.export would record."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from tests.graph.nets.language import Machine, kind

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
_POOLS = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}


def _weight(m: Machine, shape: tuple[int, ...], made_of: str) -> Any:
    """Return a weight as it is, or computed from parameters alone."""
    weight = m.tensor("weight", shape, "weight")
    if made_of == "masked":
        return m.call(aten.mul.Tensor, weight, m.tensor("mask", (1, *shape[1:])))
    if made_of == "product":
        mix = m.tensor("mix", (shape[0], shape[0]), "weight")
        flat = m.call(aten.view.default, weight, [shape[0], -1])
        return m.call(aten.view.default, m.call(aten.mm.default, mix, flat), list(shape))
    if made_of == "centred":
        mean = m.call(aten.mean.dim, weight, list(range(1, len(shape))), True)
        return m.call(aten.sub.Tensor, weight, mean)
    return weight


@kind
def conv(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    value = x[0]
    inputs, dims = m.shape(value)[1], len(o["kernel"])
    weight = _weight(m, (o["out"], inputs // o["groups"], *o["kernel"]), o.get("made_of", "plain"))
    bias = m.tensor("bias", (o["out"],)) if o["bias"] else None
    padding = o["padding"]
    if o.get("mode", "zeros") != "zeros":
        widths = [side for p in reversed(padding) for side in (p, p)]
        value = m.call(aten.pad.default, value, widths, o["mode"])
        padding = (0,) * dims
    target = _CONVOLUTIONS[dims].padding if isinstance(padding, str) else _CONVOLUTIONS[dims].default
    pads = padding if isinstance(padding, str) else list(padding)
    return m.call(target, value, weight, bias, list(o["stride"]), pads, list(o["dilation"]), o["groups"])


@kind
def transposed(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    inputs, dims = m.shape(x[0])[1], len(o["kernel"])
    weight = m.tensor("weight", (inputs, o["out"] // o["groups"], *o["kernel"]), "weight")
    bias = m.tensor("bias", (o["out"],)) if o["bias"] else None
    options = [list(o["stride"]), list(o["padding"]), list(o["output_padding"]), o["groups"], list(o["dilation"])]
    return m.call(_TRANSPOSED[dims], x[0], weight, bias, *options)


@kind
def linear(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A linear layer on the last axis."""
    weight = m.tensor("weight", (o["out"], m.shape(x[0])[-1]), "weight")
    return m.call(aten.linear.default, x[0], weight, m.tensor("bias", (o["out"],)) if o["bias"] else None)


@kind
def full(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A layer over all values of a sample, given back as an image of ``out`` channels, or as ``out`` values alone."""
    _, channels, *sizes = m.shape(x[0])
    inputs = channels * math.prod(sizes)
    outputs = o["out"] * (math.prod(sizes) if o["is_image"] else 1)
    weight = m.tensor("weight", (outputs, inputs // o["groups"], *((1, 1) if o["is_conv"] else ())), "weight")
    bias = m.tensor("bias", (outputs,)) if o["bias"] else None
    ones = [1, 1] if o["is_conv"] else []
    rows = m.call(aten.reshape.default, x[0], [m.sizes(x[0])[0], inputs, *ones])
    if o["is_conv"]:
        y = m.call(aten.conv2d.default, rows, weight, bias, [1, 1], [0, 0], [1, 1], o["groups"])
    else:
        y = m.call(aten.linear.default, rows, weight, bias)
    shape = [o["out"], *sizes] if o["is_image"] else [outputs, *(1 for _ in sizes)]
    return m.call(aten.reshape.default, y, [m.sizes(x[0])[0], *shape])


@kind
def mix(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A linear layer on the channels, moved last and back: a 1x1 convolution in other words."""
    dims = len(m.shape(x[0]))
    last = m.call(aten.permute.default, x[0], [0, *range(2, dims), 1])
    return m.call(aten.permute.default, linear(m, (last,), o), [0, dims - 1, *range(1, dims - 1)])


@kind
def tokens(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A linear layer on the channels of flattened positions, and back."""
    batch, channels, *sizes = m.sizes(x[0])
    flat = m.call(aten.view.default, x[0], [batch, channels, -1])
    mixed = linear(m, (m.call(aten.transpose.int, flat, 1, 2),), o)
    back = m.call(aten.transpose.int, mixed, 1, 2)
    return m.call(aten.reshape.default, back, [batch, o["out"], *sizes])


@kind
def norm(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    size = (m.shape(x[0])[1],)
    affine = (m.tensor("weight", size, "factor"), m.tensor("bias", size)) if o["affine"] else (None, None)
    statistics = (m.tensor("mean", size), m.tensor("var", size, "variance"))
    return m.call(aten.batch_norm.default, x[0], *affine, *statistics, False, 0.1, o.get("eps", 1e-5), False)


@kind
def factor(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """Arithmetic with a constant: of one value, one per channel or one per position, or a plain number."""
    shape = m.shape(x[0])
    trailing = (1,) * (len(shape) - 2)
    forms: dict[str, tuple[int, ...]] = {
        "channel": (shape[1], *trailing),
        "whole channel": (1, shape[1], *trailing),
        "one": (1,),
        "scalar": (),
        "last": shape[-1:],
        "position": shape[1:],
    }
    constant = o["number"] if o["form"] == "number" else m.tensor("value", forms[o["form"]], "factor")
    operators: dict[str, Callable[[], Any]] = {
        "x*c": lambda: m.call(aten.mul.Tensor, x[0], constant),
        "c*x": lambda: m.call(aten.mul.Tensor, constant, x[0]),
        "x/c": lambda: m.call(aten.div.Tensor, x[0], constant),
        "x+c": lambda: m.call(aten.add.Tensor, x[0], constant),
        "c+x": lambda: m.call(aten.add.Tensor, constant, x[0]),
        "x-c": lambda: m.call(aten.sub.Tensor, x[0], constant),
        "c-x": lambda: m.call(aten.sub.Tensor, constant, x[0]),
        "x+2c": lambda: m.call(aten.add.Tensor, x[0], constant, alpha=2),
        "c-2x": lambda: m.call(aten.sub.Tensor, constant, x[0], alpha=2),
    }
    scalars: dict[str, Callable[[], Any]] = {
        "c*x": operators["x*c"],
        "c+x": operators["x+c"],
        "c-x": lambda: m.call(aten.rsub.Scalar, x[0], constant),
        "c-2x": lambda: m.call(aten.rsub.Scalar, x[0], constant, 2),
    }
    return (scalars.get(o["op"], operators[o["op"]]) if o["form"] == "number" else operators[o["op"]])()


@kind
def addcmul(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """``bias + value * x * weight``."""
    size = (m.shape(x[0])[1], *(1,) * (len(m.shape(x[0])) - 2))
    return m.call(aten.addcmul.default, m.tensor("bias", size), x[0], m.tensor("weight", size), value=o["value"])


@kind
def negate(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    return m.call(aten.neg.default, x[0])


@kind
def plus(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """``a + alpha * b``, ``a - alpha * b`` or ``b - alpha * a``."""
    target = {"+": aten.add.Tensor, "-": aten.sub.Tensor, "r": aten.rsub.Tensor}[o["sign"]]
    return m.call(target, x[0], x[1], **({"alpha": o["alpha"]} if o.get("alpha", 1) != 1 else {}))


@kind
def cat(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    return m.call(aten.cat.default, list(x), o["dim"])


@kind
def pool(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    args = [list(o["kernel"]), list(o["stride"]), list(o["padding"]), o["ceil"], o["count"]]
    if len(o["kernel"]) > 1:
        args.append(o["divisor"])
    return m.call(_POOLS[len(o["kernel"])], x[0], *args)


@kind
def pad(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    return m.call(aten.pad.default, x[0], list(o["widths"]), o["mode"], o["value"])


@kind
def window(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    return m.call(aten.slice.Tensor, x[0], o["dim"], o["start"], o["end"], o["step"])


@kind
def part(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """One part of a split of the channels."""
    target = aten.split_with_sizes.default if isinstance(o["sizes"], tuple) else aten.split.Tensor
    sizes = list(o["sizes"]) if isinstance(o["sizes"], tuple) else o["sizes"]
    return m.call(operator.getitem, m.call(target, x[0], sizes, 1), o["index"])


@kind
def swapped(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """The two halves of the channels, swapped, the second half scaled on the way."""
    halves = m.call(aten.split.Tensor, x[0], m.shape(x[0])[1] // 2, 1)
    first, second = (m.call(operator.getitem, halves, index) for index in (0, 1))
    return m.call(aten.cat.default, [m.call(aten.mul.Tensor, second, o["scale"]), first], 1)


@kind
def same(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """What changes no value: dropout in eval mode, or a copy."""
    if o["op"] == "dropout":
        return m.call(aten.dropout.default, x[0], 0.5, False)
    if o["op"] == "contiguous":
        return m.call(aten.clone.default, x[0], memory_format=torch.contiguous_format)
    return m.call(aten.clone.default, x[0])


@kind
def bordered(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A norm, then padding with the norm's own constant (or another, or on some sides only)."""
    value = norm(m, x, {"affine": True})
    dims = len(m.shape(value)) - 2
    names = (("bias", "normal"), ("mean", "normal"), ("weight", "factor"), ("var", "variance"))
    size = (m.shape(value)[1],)
    bias, mean, gamma, var = (m.tensor(name, size, form) for name, form in names)
    deviation = m.call(aten.sqrt.default, m.call(aten.add.Tensor, var, 1e-5))
    constant = m.call(aten.sub.Tensor, bias, m.call(aten.div.Tensor, m.call(aten.mul.Tensor, mean, gamma), deviation))
    if o["constant"] == "other":
        constant = m.call(aten.mul.Tensor, constant, 0.5)
    column = m.call(aten.view.default, constant, [1, -1, *(1,) * dims])
    padded = m.call(aten.pad.default, value, [o["width"]] * (2 * dims), "constant", 0.0)
    sides = [(axis + 2, end) for axis in range(dims) for end in (False, True)]
    for dim, is_end in sides[: o["sides"]]:
        width = o["width"] + o.get("excess", 0)
        start, end = (-width, 2**63 - 1) if is_end else (0, width)
        strip = m.call(aten.slice.Tensor, padded, dim, start, end, 1)
        values = m.call(aten.expand.default, column, m.sizes(strip))
        padded = m.call(aten.slice_scatter.default, padded, values, dim, start, end, 1)
    return padded


@kind
def activation(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    targets = {"relu": aten.relu.default, "sigmoid": aten.sigmoid.default, "tanh": aten.tanh.default}
    return m.call(targets[o["op"]], x[0])


@kind
def gate(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A squeeze-excite: the scale depends on the input."""
    dims = list(range(2, len(m.shape(x[0]))))
    squeezed = m.call(aten.sigmoid.default, m.call(aten.mean.dim, x[0], dims, True))
    return m.call(aten.mul.Tensor, x[0], squeezed)


@kind
def product(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A product of two values that both depend on the input; bounded, so that scales stay."""
    return m.call(aten.mul.Tensor, x[0], m.call(aten.tanh.default, x[1]))


@kind
def mean(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """The mean over the positions: linear, but of no fixed kernel."""
    return m.call(aten.mean.dim, x[0], list(range(2, len(m.shape(x[0])))), True)


@kind
def shuffle(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """ShuffleNet's exchange of channels between two groups."""
    batch, channels, *sizes = m.sizes(x[0])
    apart = m.call(aten.view.default, x[0], [batch, 2, channels // 2, *sizes])
    swapped_axes = m.call(aten.transpose.int, apart, 1, 2)
    return m.call(aten.reshape.default, swapped_axes, [batch, channels, *sizes])


@kind
def stacked(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A sum or mean of branches written by stacking them, along a new axis."""
    joined = m.call(aten.stack.default, list(x), o["dim"])
    target = aten.sum.dim_IntList if o["op"] == "sum" else aten.mean.dim
    return m.call(target, joined, [o["dim"]])


@kind
def reduced(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A mean over the channels or one spatial axis, kept; or what is left after taking it away."""
    average = m.call(aten.mean.dim, x[0], [o["dim"]], True)
    return m.call(aten.sub.Tensor, x[0], average) if o["is_rest"] else average


@kind
def spread(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """Values copied to, taken from or interpolated between more or fewer positions."""
    calls: dict[str, Callable[[], Any]] = {
        "nearest": lambda: m.call(aten.upsample_nearest2d.vec, x[0], None, [2.0, 2.0]),
        "bilinear": lambda: m.call(aten.upsample_bilinear2d.vec, x[0], None, False, [2.0, 2.0]),
        "shuffle": lambda: m.call(aten.pixel_shuffle.default, x[0], 2),
        "unshuffle": lambda: m.call(aten.pixel_unshuffle.default, x[0], 2),
        "pooled": lambda: m.call(aten.adaptive_avg_pool2d.default, x[0], [2, 2]),
        "running sum": lambda: m.call(aten.cumsum.default, x[0], 2),
    }
    return calls[o["op"]]()


@kind
def matrix(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """A constant matrix over the channels of flattened positions: a 1x1 convolution by matrix product."""
    batch, channels, *sizes = m.sizes(x[0])
    weight = m.tensor("weight", (o["out"], channels), "weight")
    flat = m.call(aten.reshape.default, x[0], [batch, channels, -1])
    return m.call(aten.reshape.default, m.call(aten.matmul.default, weight, flat), [batch, o["out"], *sizes])


@kind
def rearranged(m: Machine, x: Any, o: dict[str, Any]) -> Any:
    """Positions in another order, or spread out: linear, but no convolution."""
    if o["op"] == "flip":
        return m.call(aten.flip.default, x[0], [2])
    if o["op"] == "roll":
        return m.call(aten.roll.default, x[0], [1], [2])
    return m.call(aten.transpose.int, x[0], 2, 3)
