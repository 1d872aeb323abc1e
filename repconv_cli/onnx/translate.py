"""An ONNX graph as a :class:`Program`: ATen operators where they mean the same, unknown operators otherwise."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from repconv_cli.errors import InputError
from repconv_cli.graph.inputs import NO_KEYWORDS
from repconv_cli.graph.interpret import to_double
from repconv_cli.graph.program import LEAF, Program, Structure
from repconv_cli.onnx import elementwise, layers, moves
from repconv_cli.onnx.call import MOST_EVALUATED, GraphMaker, OnnxCall
from repconv_cli.onnx.operator import RANDOM, OnnxOperator, StoredTensor
from repconv_cli.onnx.reading import OnnxFile, graphs_in
from repconv_cli.onnx.shapes import Inference, Known, overridable
from repconv_cli.onnx.table import TRANSLATIONS

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = ["Translated", "elementwise", "layers", "moves", "translate"]


@dataclass(frozen=True)
class Translated:
    """A file's graph as a program, and which node stands for what in the file.

    ``values`` gives the node of each value by name; ``origins`` the place of the ONNX operator that a node belongs to;
    ``constants`` are the nodes that no input reaches.
    """

    file: OnnxFile
    program: Program
    values: dict[str, fx.Node]
    origins: dict[fx.Node, int]
    constants: frozenset[fx.Node]

    def names(self) -> dict[fx.Node, str]:
        """Return the name that a node's value has in the file."""
        return {node: name for name, node in self.values.items()}

    def operators(self) -> list[OnnxOperator]:
        """Return the operators that nothing stands for."""
        return [node.target for node in self.program.graph.nodes if isinstance(node.target, OnnxOperator)]


def translate(file: OnnxFile, inference: Inference) -> Translated:
    """Return the graph of ``file`` as a program. Nothing of it is run but small constants."""
    translator = _Translator(file, inference)
    translator.inputs()
    for index, node in enumerate(file.model.graph.node):
        translator.node(index, node)
    return translator.finish()


class _Translator:
    def __init__(self, file: OnnxFile, inference: Inference) -> None:
        self.file = file
        self.known = inference.known
        self.infos = inference.inputs
        self.maker = GraphMaker()
        self.values: dict[str, fx.Node] = {}
        self.origins: dict[fx.Node, int] = {}
        self.parameters: set[str] = set()

    def inputs(self) -> None:
        for position, info in enumerate(self.infos):
            node = self.maker.graph.placeholder(f"input_{position}")
            known = self.known[info.name]
            free = tuple(size is None for size in info.shape)
            node.meta = {"shape": known.shape, "free": free, "dtype": known.dtype}
            self.values[info.name] = node
        replaceable = overridable(self.file)
        for name, proto in self.file.initializers().items():
            tensor = self.file.tensor(proto)
            if tensor is None or name in replaceable:
                self.values[name] = self._variable(name, tensor)
                continue
            self._store(name, tensor)
            if tensor.is_floating_point():
                self.parameters.add(name)
        for sparse in self.file.model.graph.sparse_initializer:
            self.values[sparse.values.name] = self._variable(sparse.values.name, None)

    def _variable(self, name: str, tensor: Tensor | None) -> fx.Node:
        """Return a value that must not be taken for a constant: it counts as one made from the input."""
        first = next(iter(self.maker.graph.nodes))
        if tensor is None:
            import onnx

            unknown = onnx.helper.make_node("Unreadable", [], [name], domain="repconv")
            return self.maker.call(OnnxOperator(unknown, self.file.opset), (first,), None, name)
        known = Known(tuple(tensor.shape), (False,) * tensor.ndim, tensor.dtype)
        return self.maker.call(StoredTensor(tensor), (first,), known, name)

    def _store(self, name: str, tensor: Tensor, known: Known | None = None, key: str | None = None) -> None:
        dtype = tensor.dtype if known is None else known.dtype
        key = name if key is None or key in self.maker.stored else key
        node = self.maker.graph.get_attr(key)
        node.meta = {"shape": tuple(tensor.shape), "free": (False,) * tensor.ndim, "dtype": dtype, "module": ""}
        self.maker.constants.add(node)
        self.maker.stored[key] = tensor
        self.values[name] = node

    def node(self, index: int, node: NodeProto) -> None:
        if node.domain in ("", "ai.onnx") and node.op_type in RANDOM:
            raise InputError(f"it draws random numbers ({node.op_type}), so its outputs cannot be compared")
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and self._constant(node):
            return
        before = len(self.maker.made)
        made = self._translated(node) or self._unknown(node)
        for name, value in zip(node.output, made, strict=False):
            if name:
                self.values[name] = value
        self.origins.update(dict.fromkeys(self.maker.made[before:], index))

    def _constant(self, node: NodeProto) -> bool:
        for attribute in node.attribute:
            if attribute.name == "value":
                tensor = self.file.tensor(attribute.t)
                if tensor is not None:
                    self._store(node.output[0], tensor)
                    return True
        return False

    def _call(self, node: NodeProto) -> OnnxCall:
        operands = tuple(self.values[name] if name else None for name in node.input)
        known = tuple(self.known.get(name) if name else None for name in node.output)
        return OnnxCall(node, operands, self.maker, known, self.file.opset)

    def _translated(self, node: NodeProto) -> tuple[fx.Node, ...] | None:
        """Return the ATen nodes of the outputs, None where the operator stays one that nothing is known of."""
        rule = TRANSLATIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or any("shape" not in self.values[name].meta for name in node.input if name):
            return None
        before = len(self.maker.made)
        try:
            call = self._call(node)
            found = rule(call)
            made = found if isinstance(found, tuple) else (found,) if found is not None else None
            if made is not None and all(self._agree(*pair) for pair in zip(made, call.known, strict=False)):
                return made
        except Exception:  # noqa: BLE001 - operands that ATen refuses in any way: the operator stays
            pass
        self.maker.forget_since(before)
        return None

    def _agree(self, node: fx.Node, known: Known | None) -> bool:
        """Whether the ATen operator gives the shape and type that the value has; its free sizes are noted."""
        if known is None:
            return True
        if (node.meta["shape"], node.meta["dtype"]) != (known.shape, known.dtype):
            return False
        node.meta["free"] = known.free
        return True

    def _unknown(self, node: NodeProto) -> tuple[fx.Node, ...]:
        """Return the outputs of an operator that nothing stands for; it reads what its inner graphs read too."""
        operands: list[Any] = [self.values[name] if name else None for name in node.input]
        operands += [self.values[name] for name in sorted(captured(node)) if name in self.values]
        target = OnnxOperator(node, self.file.opset)
        is_pure = node.domain in ("", "ai.onnx") and not any(True for _ in graphs_in(node))
        if not is_pure and all(value in self.maker.constants for value in operands if value is not None):
            # What it does is not known, so it is no constant either.
            operands.append(next(iter(self.maker.graph.nodes)))
        known = [self.known.get(name) if name else None for name in node.output]
        if len(known) == 1 and (stored := self._evaluated(target, operands, node.output[0])) is not None:
            return (stored,)
        whole = self.maker.call(target, tuple(operands), known[0] if len(known) == 1 else None, node.name)
        if len(known) == 1:
            return (whole,)
        return tuple(
            self.maker.call(operator.getitem, (whole, index), known[index], node.name) for index in range(len(known))
        )

    def _evaluated(self, target: OnnxOperator, operands: list[Any], name: str) -> fx.Node | None:
        """Return a small constant that ONNX's reference computes, as a tensor of the graph."""
        known = self.known.get(name)
        if known is None or any(value is not None and self.maker.value(value) is None for value in operands):
            return None
        if torch.Size(known.shape).numel() > MOST_EVALUATED:
            return None
        try:
            found = target(*(None if value is None else to_double(self.maker.value(value)) for value in operands))
        except InputError:
            return None
        if not isinstance(found, Tensor) or tuple(found.shape) != known.shape:
            return None
        self._store(name, found, known, f"{_path(operands)}{name}")
        return self.values[name]

    def finish(self) -> Translated:
        outputs = [self.values[value.name] for value in self.file.model.graph.output]
        self.maker.graph.output(tuple(outputs))
        read = {str(node.target) for node in self.maker.graph.nodes if node.op == "get_attr" and node.users}
        for node in list(self.maker.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.maker.graph.erase_node(node)
        program = Program(
            graph=self.maker.graph,
            tensors={key: tensor for key, tensor in self.maker.stored.items() if key in read},
            parameters=frozenset(self.parameters & read),
            inputs=self.infos,
            arguments=Structure("tuple", (LEAF,) * len(self.infos)),
            keywords=NO_KEYWORDS,
            outputs=Structure("tuple", (LEAF,) * len(outputs)),
            pads_unevenly=True,
        )
        return Translated(self.file, program, self.values, self.origins, frozenset(self.maker.constants))


def captured(node: NodeProto) -> set[str]:
    """Return the names that the graphs inside ``node`` take from outside of themselves."""
    found: set[str] = set()
    for graph in graphs_in(node):
        found |= _free_names(graph)
    return found


def _free_names(graph: GraphProto) -> set[str]:
    own = {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    read: set[str] = {value.name for value in graph.output}
    for node in graph.node:
        own.update(node.output)
        read.update(name for name in node.input if name)
        read |= captured(node)
    return read - own


def _path(operands: list[Any]) -> str:
    """Return the module path of the first tensor that a constant is made of, with its dot; empty without one."""
    for operand in operands:
        if operand is not None and operand.op == "get_attr" and "." in str(operand.target):
            return str(operand.target).rpartition(".")[0] + "."
    return ""
