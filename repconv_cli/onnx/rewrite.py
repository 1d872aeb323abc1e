"""Execute a plan on an ONNX model: blocks become nodes, all else stays as it is, name by name and byte by byte."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repconv_cli.graph.plan import Plan
from repconv_cli.graph.rewrite import Fusion, fuse_block
from repconv_cli.onnx.blocks import BlockWriter
from repconv_cli.onnx.names import Names, count_reads, reads_of
from repconv_cli.onnx.translate import Translated, captured
from repconv_cli.onnx.values import ELEMENT_TYPES, proto_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def planned_nodes(translated: Translated, plan: Plan) -> list[NodeProto]:
    """Return the operators that :func:`rewrite` would leave, with no kernel computed."""
    fusions = tuple(fuse_block(block) for block in plan.blocks)
    zero = torch.zeros((), dtype=torch.float64)
    shadows = {key: zero.expand(shape) for block in plan.blocks for key, shape in block.tensors.items()}
    return _Rewriter(translated, fusions, shadows).nodes()


def rewrite(translated: Translated, fusions: tuple[Fusion, ...], tensors: dict[str, Tensor]) -> ModelProto:
    """Return a copy of the model with each block written as its operator; ``tensors`` are the fused ones by key.

    What nothing reads any more is left out: operators, constants, notes on sizes. The original is not changed.
    """
    return _Rewriter(translated, fusions, tensors).model()


class _Rewriter:
    def __init__(self, translated: Translated, fusions: tuple[Fusion, ...], tensors: dict[str, Tensor]) -> None:
        self.translated = translated
        self.source = translated.file.model
        self.names = Names(self.source.graph)
        self.stored: dict[str, tuple[str, Tensor]] = {}
        self.writer = BlockWriter(translated, fusions, tensors, self.names.fresh, self._store)
        self.renamed: dict[str, str] = {}
        self.new: list[NodeProto] = []
        self.before = count_reads(self.source.graph.node, self.source.graph)
        self.unread: set[int] = set()

    def _store(self, wanted: str, tensor: Tensor) -> str:
        name = self.names.fresh(wanted)
        self.stored[name] = (wanted, tensor)
        return name

    def model(self) -> ModelProto:
        import onnx

        nodes = self.nodes()
        after = count_reads(nodes, self.source.graph)
        made = onnx.ModelProto()
        made.CopyFrom(self.source)
        graph = made.graph
        dead = {tensor.name for tensor in graph.initializer if self.before[tensor.name] and not after[tensor.name]}
        initializers = [tensor for tensor in graph.initializer if tensor.name not in dead]
        _replace(graph.initializer, initializers)
        _replace(graph.input, [value for value in graph.input if value.name not in dead])
        self._name_as_wanted(nodes, dead, after)
        for name, (_, tensor) in self.stored.items():
            if after[name]:
                self._add_constant(graph, self.renamed.get(name, name), tensor)
        _replace(graph.node, nodes)
        present = {name for node in nodes for name in node.output} | {value.name for value in graph.input}
        present |= {tensor.name for tensor in graph.initializer}
        kept = [value for value in graph.value_info if value.name in present]
        _replace(graph.value_info, kept)
        _replace(graph.quantization_annotation, [q for q in graph.quantization_annotation if q.tensor_name in present])
        return made

    def _add_constant(self, graph: Any, name: str, tensor: Tensor) -> None:
        import onnx

        graph.initializer.append(proto_of(name, tensor))
        if self.source.ir_version < 4:
            # Constants must be listed among the inputs there.
            shape = tuple(tensor.shape)
            graph.input.append(onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[tensor.dtype], shape))

    def _name_as_wanted(self, nodes: list[NodeProto], dead: set[str], reads: Counter[str]) -> None:
        """Give fused tensors the names of those that they replace, where these are gone."""
        produced = {name for node in nodes for name in node.output}
        lost = dead | {name for node in self.source.graph.node for name in node.output if name not in produced}
        for name, (wanted, _) in self.stored.items():
            if name != wanted and wanted in lost and reads[name]:
                self.renamed[name] = wanted
                lost.discard(wanted)
        for node in self.new:
            for position, name in enumerate(node.input):
                node.input[position] = self.renamed.get(name, name)

    def nodes(self) -> list[NodeProto]:
        """Return the operators in order, those of blocks in the place of what gave their value."""
        graph = self.source.graph
        fixed = {value.name for value in graph.output}.union(*(captured(node) for node in graph.node))
        same: dict[str, str] = {}
        nodes: list[NodeProto] = []
        for index, node in enumerate(graph.node):
            copied = _copy(node, same)
            if not any(self.before[name] for name in node.output):
                self.unread.add(id(copied))
            if index in self.writer.touched:
                nodes += self._rewritten(copied, fixed, same)
            else:
                nodes.append(copied)
        return self._live(nodes)

    def _rewritten(self, node: NodeProto, fixed: set[str], same: dict[str, str]) -> list[NodeProto]:
        """Return what an operator becomes that gives a block's value, and perhaps others besides."""
        import onnx

        nodes: list[NodeProto] = []
        kept = False
        for position, name in enumerate(node.output):
            if not name:
                continue
            value = self.translated.values[name]
            if value in self.writer.named and self.writer.named[value] == name:
                kept = True
                continue
            written, found = self.writer.write(value, name)
            for new in written:
                for place, read in enumerate(new.input):
                    new.input[place] = same.get(read, read)
            self.new += written
            nodes += written
            if found != name and name in fixed:
                nodes.append(onnx.helper.make_node("Identity", [same.get(found, found)], [name], name=node.name))
            elif found != name:
                same[name] = same.get(found, found)
            node.output[position] = self.names.fresh(f"{name}.unused")
        return [node, *nodes] if kept else nodes

    def _live(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """Return the operators without those that nobody reads any more; those that nobody ever read stay."""
        reads = count_reads(nodes, self.source.graph)
        kept: list[NodeProto] = []
        for node in reversed(nodes):
            if id(node) in self.unread or any(reads[name] for name in node.output):
                kept.append(node)
            else:
                reads.subtract(reads_of(node))
        return kept[::-1]


def _copy(node: NodeProto, same: dict[str, str]) -> NodeProto:
    import onnx

    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    for position, name in enumerate(copied.input):
        copied.input[position] = same.get(name, name)
    return copied


def _replace(field: Any, values: list[Any]) -> None:
    """Make ``values`` the content of a repeated field, which may hold some of them now."""
    kept = [type(value)() for value in values]
    for copy, value in zip(kept, values, strict=True):
        copy.CopyFrom(value)
    del field[:]
    field.extend(kept)
