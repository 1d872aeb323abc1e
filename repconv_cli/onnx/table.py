"""The table of translations: ONNX operators that ATen operators stand for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from repconv_cli.graph.rules.registry import Call, Step, rule
from repconv_cli.onnx.call import OnnxCall

aten = torch.ops.aten

Translation = Callable[[OnnxCall], "fx.Node | tuple[fx.Node, ...] | None"]
TRANSLATIONS: dict[str, Translation] = {}


def translates(*names: str) -> Callable[[Translation], Translation]:
    """Register a translation for operators of ONNX's own domain.

    It returns a node (or one for each output), or None where no ATen operator means the same: the operator then stays
    one that nothing is known of. Whatever it raises counts as None too.
    """

    def register(function: Translation) -> Translation:
        TRANSLATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def same(x: Tensor) -> Tensor:
    """Return ``x``: what an identity, or dropout in eval mode, does. It costs nothing, so it is no gain to remove."""
    return x


@rule(same)
def same_values(call: Call) -> Step | None:
    """A value under another name is itself."""
    x = call.variable(call.operand(0))
    return None if x is None else Step((x,), lambda terms, _: terms[0])


def is_floating(node: fx.Node | None) -> bool:
    """Whether the value is known to be a tensor of floating numbers."""
    return node is not None and "dtype" in node.meta and bool(node.meta["dtype"].is_floating_point)
