"""What a translation is given: one ONNX operator, its operands in the graph being made, and the means to add to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.graph.interpret import run_node
from repconv_cli.onnx.shapes import Known

if TYPE_CHECKING:
    from onnx import NodeProto

# Constants of this many values are evaluated while the graph is made; larger ones when somebody reads them.
MOST_EVALUATED = 10_000


class Folded:
    """An operator on constants: every runtime computes it once, so it counts as no operation."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.__name__ = str(getattr(target, "__name__", "call"))

    def __call__(self, *operands: Any, **keywords: Any) -> Any:
        """Return what the operator gives."""
        return self.target(*operands, **keywords)


class GraphMaker:
    """The ATen graph being made: every node gets its shape, and small constants their value."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.constants: set[fx.Node] = set()
        self.values: dict[fx.Node, Any] = {}
        self.stored: dict[str, Tensor] = {}
        self.made: list[fx.Node] = []

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        known: Known | None,
        module: str,
        keywords: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Return a new node; ``known`` is what is known of its value."""
        name = str(getattr(target, "__name__", "call")).partition(".")[0].lower()
        node = self.graph.create_node("call_function", target, args, keywords or {}, name=name)
        self.made.append(node)
        node.meta = {"module": module}
        if known is not None:
            node.meta |= {"shape": known.shape, "free": known.free, "dtype": known.dtype}
        if all(source in self.constants for source in node.all_input_nodes):
            self.constants.add(node)
            node.target = Folded(target)
        return node

    def forget_since(self, count: int) -> None:
        """Take back the calls made since there were ``count``."""
        while len(self.made) > count:
            node = self.made.pop()
            self.constants.discard(node)
            self.values.pop(node, None)
            self.graph.erase_node(node)

    def value(self, node: Any) -> Tensor | None:
        """Return the value of a small constant, else None."""
        if not isinstance(node, fx.Node) or node not in self.constants:
            return None
        shape = node.meta.get("shape")
        if shape is None or torch.Size(shape).numel() > MOST_EVALUATED:
            return None
        if node not in self.values:
            self.values[node] = self._evaluated(node)
        found: Tensor | None = self.values[node]
        return found

    def _evaluated(self, node: fx.Node) -> Any:
        """Return the value of a constant; None where it cannot be computed."""
        if node.op == "get_attr":
            return self.stored[str(node.target)]
        sources = [source for source in node.all_input_nodes if source not in self.values]
        for source in sources:
            self.values[source] = self._evaluated(source)
        if any(self.values[source] is None for source in node.all_input_nodes):
            return None
        try:
            return run_node(node, lambda n: self.values[n])
        except Exception:  # noqa: BLE001 - it stays an operator of the model, whatever it is
            return None


@dataclass(frozen=True)
class OnnxCall:
    """One operator to be translated; operands that are left out are None."""

    node: NodeProto
    operands: tuple[fx.Node | None, ...]
    maker: GraphMaker
    known: tuple[Known | None, ...]
    opset: int

    @property
    def module(self) -> str:
        """What the place is called in the file."""
        return self.node.name or next((name for name in self.node.output if name), self.node.op_type)

    def operand(self, index: int) -> fx.Node | None:
        """Return an operand, None where it is left out."""
        return self.operands[index] if index < len(self.operands) else None

    def shape(self, index: int = 0) -> tuple[int, ...] | None:
        """Return the sizes of an operand, None where they are not known."""
        node = self.operand(index)
        return None if node is None else node.meta.get("shape")

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute as a Python value: a number, text, or a list of numbers."""
        from onnx import helper

        for attribute in self.node.attribute:
            if attribute.name == name:
                value = helper.get_attribute_value(attribute)
                if isinstance(value, bytes):
                    return value.decode(errors="replace")
                return list(value) if not isinstance(value, (int, float)) and hasattr(value, "__iter__") else value
        return default

    def numbers(self, index: int, attribute: str = "") -> list[int] | None:
        """Return whole numbers that are an operand or, in older opsets, an attribute; None where they are computed."""
        operand = self.operand(index)
        if operand is None:
            found = self.attribute(attribute) if attribute else None
            return None if found is None else [int(v) for v in found]
        value = self.maker.value(operand)
        return None if value is None else [int(v) for v in value.flatten().tolist()]

    def has_operand(self, index: int) -> bool:
        """Whether an operand is given."""
        return self.operand(index) is not None

    def emit(self, target: Any, *args: Any, free: tuple[bool, ...] | None = None, **keywords: Any) -> fx.Node:
        """Return a new ATen node on ``args``; its shape follows from running it without values."""
        shape, dtype = shape_without_values(target, args, keywords)
        sources = [a for a in args if isinstance(a, fx.Node)] or [a for a in args[0] if isinstance(a, fx.Node)]
        own = sources[0].meta["free"]
        if free is None:
            free = own if len(own) == len(shape) else (any(any(s.meta["free"]) for s in sources),) * len(shape)
        return self.maker.call(target, args, Known(shape, free, dtype), self.module, keywords)


def shape_without_values(
    target: Any, args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return the shape and type that an operator gives; raises whatever it raises for operands that do not fit."""

    def shadow(node: fx.Node) -> Tensor:
        return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")

    found = target(*map_arg(args, shadow), **keywords)
    return tuple(found.shape), found.dtype
