"""Translations of operators on each value by itself, and of a few that are only to be run."""

from __future__ import annotations

from typing import Any

from torch import fx

from repconv_cli.onnx.call import OnnxCall
from repconv_cli.onnx.table import aten, is_floating, same, translates

_ARITHMETIC = {"Add": aten.add.Tensor, "Sub": aten.sub.Tensor, "Mul": aten.mul.Tensor, "Div": aten.div.Tensor}


@translates("Add", "Sub", "Mul", "Div")
def arithmetic(call: OnnxCall) -> fx.Node | None:
    """A sum, difference, product or quotient of floating numbers; those of whole numbers are sizes, mostly."""
    left, right = call.operand(0), call.operand(1)
    # Before opset 7 the second operand was placed by an attribute.
    if not is_floating(left) or not is_floating(right):
        return None
    return call.emit(_ARITHMETIC[call.node.op_type], left, right)


@translates("Sum")
def sum_of_all(call: OnnxCall) -> fx.Node | None:
    """A sum of any number of values, one after the other."""
    first, *others = call.operands
    if not all(is_floating(operand) for operand in call.operands):
        return None
    assert first is not None
    if not others:
        return call.emit(same, first)
    total = first
    for other in others:
        total = call.emit(aten.add.Tensor, total, other)
    return total


@translates("Neg")
def negation(call: OnnxCall) -> fx.Node | None:
    """A negation."""
    return call.emit(aten.neg.default, call.operand(0)) if is_floating(call.operand(0)) else None


@translates("BatchNormalization")
def batch_norm(call: OnnxCall) -> fx.Node | None:
    """A batch norm in eval mode."""
    x = call.operand(0)
    is_training = call.attribute("training_mode", 0) or any(call.node.output[1:])
    if x is None or is_training or not call.attribute("spatial", 1) or call.attribute("is_test", 1) != 1:
        return None
    gamma, beta, mean, var = (call.operand(index) for index in range(1, 5))
    eps = float(call.attribute("epsilon", 1e-5))
    return call.emit(aten.batch_norm.default, x, gamma, beta, mean, var, False, 0.1, eps, False)


@translates("Identity", "Dropout")
def copy(call: OnnxCall) -> fx.Node | None:
    """A copy, or dropout where nobody asks for training."""
    training = call.maker.value(call.operand(2)) if call.has_operand(2) else None
    is_training = call.has_operand(2) and (training is None or bool(training.any()))
    if not is_floating(call.operand(0)) or is_training or any(call.node.output[1:]):
        return None
    return call.emit(same, call.operand(0))


@translates("Cast", "CastLike")
def cast(call: OnnxCall) -> fx.Node | None:
    """A cast; to the type that the value has already it changes nothing. Of what it is like only the type is read."""
    x, known = call.operand(0), call.known[0]
    if known is None or x is None or "dtype" not in x.meta:
        return None
    if known.dtype == x.meta["dtype"]:
        return call.emit(same, x)
    return call.emit(aten._to_copy.default, x, dtype=known.dtype)


_BY_ITSELF = {
    "Erf": aten.erf.default,
    "Relu": aten.relu.default,
    "Sigmoid": aten.sigmoid.default,
    "HardSwish": aten.hardswish.default,
    "Tanh": aten.tanh.default,
    "Softplus": aten.softplus.default,
    "Mish": aten.mish.default,
}


@translates(*_BY_ITSELF)
def activation(call: OnnxCall) -> fx.Node | None:
    """An activation, to be run alone."""
    x = call.operand(0)
    return call.emit(_BY_ITSELF[call.node.op_type], x) if is_floating(x) and len(call.node.attribute) == 0 else None


@translates("Gelu")
def gelu(call: OnnxCall) -> fx.Node | None:
    """An activation, to be run alone."""
    return call.emit(aten.gelu.default, call.operand(0), approximate=call.attribute("approximate", "none"))


@translates("Softmax")
def softmax(call: OnnxCall) -> fx.Node | None:
    """A softmax along one axis (since opset 13; earlier ones flatten the rest), to be run alone."""
    if call.opset < 13 or not is_floating(call.operand(0)):
        return None
    return call.emit(aten.softmax.int, call.operand(0), int(call.attribute("axis", -1)))


@translates("LayerNormalization")
def layer_norm(call: OnnxCall) -> fx.Node | None:
    """A norm over the last axes of the sample: its reason to be left is told by its name."""
    shape = call.shape()
    if shape is None or any(call.node.output[1:]):
        return None
    axis = int(call.attribute("axis", -1)) % len(shape)
    operands = (call.operand(0), list(shape[axis:]), call.operand(1), call.operand(2))
    return call.emit(aten.layer_norm.default, *operands, float(call.attribute("epsilon", 1e-5)))


@translates("GatherElements")
def gather(call: OnnxCall) -> fx.Node | None:
    """Values picked along one axis, to be run alone: ONNX's reference picks among few only."""
    return call.emit(aten.gather.default, call.operand(0), int(call.attribute("axis", 0)), call.operand(1))


@translates("GridSample")
def grid_sample(call: OnnxCall) -> fx.Node | None:
    """Values taken at computed places, to be run alone."""
    modes = {"linear": 0, "bilinear": 0, "nearest": 1}
    borders = {"zeros": 0, "border": 1, "reflection": 2}
    mode, border = call.attribute("mode", "linear"), call.attribute("padding_mode", "zeros")
    shape = call.shape()
    if shape is None or len(shape) != 4 or mode not in modes:
        return None
    is_aligned = bool(call.attribute("align_corners", 0))
    operands: tuple[Any, ...] = (call.operand(0), call.operand(1), modes[mode], borders[border], is_aligned)
    return call.emit(aten.grid_sampler_2d.default, *operands)


@translates("Resize", "Upsample")
def resize(call: OnnxCall) -> fx.Node | None:
    """An image made larger by a whole factor from the nearest values, to be run alone."""
    x, known = call.operand(0), call.known[0]
    if x is None or known is None or len(known.shape) != 4 or x.meta["shape"][:2] != known.shape[:2]:
        return None
    if call.attribute("mode", "nearest") != "nearest":
        return None
    pairs = list(zip(x.meta["shape"][2:], known.shape[2:], strict=True))
    place = call.attribute("coordinate_transformation_mode", "half_pixel")
    is_floored = place == "asymmetric" and call.attribute("nearest_mode", "round_prefer_floor") == "floor"
    if any(new % old for old, new in pairs) or not (is_floored or place in ("half_pixel", "pytorch_half_pixel")):
        return None
    return call.emit(aten.upsample_nearest2d.vec, x, None, [float(new // old) for old, new in pairs])
