"""Names in a model: which are taken, and what reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from repconv_cli.onnx.reading import graphs_in
from repconv_cli.onnx.translate import captured

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


class Names:
    """Names of values and operators, of the graph and of all graphs inside it; new ones differ from all of them."""

    def __init__(self, graph: GraphProto) -> None:
        self.taken: set[str] = set()
        self._collect(graph)

    def _collect(self, graph: GraphProto) -> None:
        self.taken.update(tensor.name for tensor in graph.initializer)
        self.taken.update(sparse.values.name for sparse in graph.sparse_initializer)
        self.taken.update(value.name for value in (*graph.input, *graph.output, *graph.value_info))
        for node in graph.node:
            self.taken.update((node.name, *node.input, *node.output))
            for inner in graphs_in(node):
                self._collect(inner)

    def fresh(self, wanted: str) -> str:
        """Return ``wanted``, or it with the first number that makes it new; it is taken from then on."""
        name, number = wanted, 1
        while name in self.taken:
            number += 1
            name = f"{wanted}.{number}"
        self.taken.add(name)
        return name


def reads_of(node: NodeProto) -> list[str]:
    """Return the names that an operator reads, itself or in its inner graphs, each as often as it does."""
    return [*(name for name in node.input if name), *captured(node)]


def count_reads(nodes: Iterable[NodeProto], graph: GraphProto) -> Counter[str]:
    """Return how often each value is read by ``nodes`` or given as an output of ``graph``."""
    reads = Counter(value.name for value in graph.output)
    for node in nodes:
        reads.update(reads_of(node))
    return reads
