"""ATen operators written as ONNX nodes: those that a fused block, and what may surround it, is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from repconv_cli.errors import UnprovenError
from repconv_cli.onnx.table import aten, same

if TYPE_CHECKING:
    from onnx import NodeProto

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Emitter:
    """Writes nodes one after the other; ``fresh`` gives names that nothing has, ``store`` keeps a new constant.

    Values are names. ``place`` starts the names of what is made.
    """

    def __init__(
        self, opset: int, place: str, fresh: Callable[[str], str], store: Callable[[str, Tensor], str]
    ) -> None:
        self.opset = opset
        self.place = place
        self.fresh = fresh
        self.store = store
        self.nodes: list[NodeProto] = []

    def node(self, op: str, inputs: Iterable[str], **attributes: Any) -> str:
        """Write one node and return the name of its output."""
        from onnx import helper

        output = self.fresh(f"{self.place}.{op.lower()}")
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=self.fresh(self.place), **attributes))
        return output

    def numbers(self, values: Iterable[int]) -> str:
        """Return the name of a constant of whole numbers."""
        return self.store(f"{self.place}.numbers", torch.tensor(list(values), dtype=torch.int64))

    def scalar(self, value: float, dtype: torch.dtype) -> str:
        """Return the name of one number as a constant."""
        return self.store(f"{self.place}.number", torch.tensor(value, dtype=dtype))

    def emit(self, target: Any, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
        """Return the name of the value of an ATen operator whose operands are names; ``x`` is its first one's node."""
        if target not in WRITERS:
            raise UnprovenError(f"no ONNX operator is known for {target}")
        return WRITERS[target](self, args, keywords, x)


Writer = Callable[[Emitter, tuple[Any, ...], dict[str, Any], "fx.Node | None"], str]
WRITERS: dict[Any, Writer] = {}


def _writes(*targets: Any) -> Callable[[Writer], Writer]:
    def register(function: Writer) -> Writer:
        WRITERS.update(dict.fromkeys(targets, function))
        return function

    return register


def write_convolution(
    to: Emitter, operands: list[str], kernel: list[int], pads: list[int], options: tuple[list[int], list[int], int]
) -> str:
    """Write a convolution; ``pads`` are all low sides, then all high ones."""
    strides, dilations, group = options
    return to.node("Conv", operands, kernel_shape=kernel, pads=pads, strides=strides, dilations=dilations, group=group)


@_writes(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _transposed(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    *operands, strides, low, more, group, dilations = args
    return to.node(
        "ConvTranspose",
        [operand for operand in operands if operand is not None],
        pads=[*low, *low],
        strides=list(strides),
        output_padding=list(more),
        dilations=list(dilations),
        group=group,
    )


def _named(to: Emitter, value: Any, dtype: torch.dtype) -> str:
    return value if isinstance(value, str) else to.scalar(float(value), dtype)


def _writer_of(op: str) -> Writer:
    def write(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
        assert x is not None
        dtype = x.meta["dtype"]
        left, right = args[:2]
        alpha = keywords.get("alpha", 1)
        if alpha != 1:
            right = to.node("Mul", [_named(to, right, dtype), to.scalar(float(alpha), dtype)])
        return to.node(op, [_named(to, left, dtype), _named(to, right, dtype)])

    return write


WRITERS |= {
    aten.add.Tensor: _writer_of("Add"),
    aten.sub.Tensor: _writer_of("Sub"),
    aten.mul.Tensor: _writer_of("Mul"),
    aten.div.Tensor: _writer_of("Div"),
}


@_writes(aten.addcmul.default)
def _scale_and_shift(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    shift, value, scale = args
    return to.node("Add", [to.node("Mul", [value, scale]), shift])


@_writes(aten.neg.default)
def _negation(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    return to.node("Neg", args)


@_writes(same)
def _copy(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    return to.node("Identity", args)


@_writes(aten.permute.default)
def _permute(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    return to.node("Transpose", [args[0]], perm=list(args[1]))


def _on_axes(op: str) -> Writer:
    def write(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
        del keywords, x
        axes = list(args[1]) if isinstance(args[1], (list, tuple)) else [args[1]]
        if to.opset < 13:
            return to.node(op, [args[0]], axes=axes)
        return to.node(op, [args[0], to.numbers(axes)])

    return write


WRITERS |= {aten.unsqueeze.default: _on_axes("Unsqueeze"), aten.squeeze.dims: _on_axes("Squeeze")}


@_writes(aten.flatten.using_ints)
def _flatten(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    """Zeros in a reshape keep a size, so any sizes may be free before the axes that are merged."""
    del keywords
    assert x is not None
    value, first, last = args
    shape, free = x.meta["shape"], x.meta["free"]
    last %= len(shape)
    after = [shape[axis] for axis in range(last + 1, len(shape))]
    merged = prod(shape[first : last + 1])
    if any(free[last + 1 :]):
        if any(free[first : last + 1]) or sum(free[last + 1 :]) > 1:
            raise UnprovenError("axes are merged before others whose sizes are free")
        after = [-1 if is_free else size for size, is_free in zip(after, free[last + 1 :], strict=True)]
    else:
        merged = -1
    return to.node("Reshape", [value, to.numbers([*[0] * first, merged, *after])])


@_writes(aten.reshape.default)
def _reshape(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords, x
    value, shape = args
    return to.node("Reshape", [value, to.numbers(shape)])


@_writes(aten.pad.default)
def _pad(to: Emitter, args: tuple[Any, ...], keywords: dict[str, Any], x: fx.Node | None) -> str:
    del keywords
    assert x is not None
    value, widths, mode = (*args, "constant")[:3]
    constant = float(args[3] or 0.0) if len(args) > 3 else 0.0
    ndim = len(x.meta["shape"])
    pairs = [(0, 0)] * (ndim - len(widths) // 2) + list(zip(widths[::2], widths[1::2], strict=True))[::-1]
    pads = [low for low, _ in pairs] + [high for _, high in pairs]
    if mode == "circular" and to.opset < 19:
        raise UnprovenError(f"circular padding, which opset {to.opset} does not have")
    if to.opset < 11:
        return to.node("Pad", [value], pads=pads, mode=_PAD_MODES[mode], value=constant)
    operands = [value, to.numbers(pads)]
    if mode == "constant" and constant:
        operands.append(to.scalar(constant, x.meta["dtype"]))
    return to.node("Pad", operands, mode=_PAD_MODES[mode])
