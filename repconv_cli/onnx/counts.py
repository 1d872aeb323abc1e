"""How many operators an ONNX graph has, and tensors with how many values."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from repconv_cli.onnx.names import reads_of
from repconv_cli.onnx.values import DTYPES

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def count_operators(nodes: Iterable[NodeProto], graph: GraphProto) -> dict[str, int]:
    """Return the numbers of convolutions, batch norms and operators that an input reaches.

    What constants alone decide is no operation: every runtime computes it once.
    """
    constants = {tensor.name for tensor in graph.initializer}
    reached = {value.name for value in graph.input} - constants
    counts = {"convs": 0, "norms": 0, "ops": 0}
    for node in nodes:
        reads = reads_of(node)
        if node.op_type == "Constant" or (reads and not any(name in reached for name in reads)):
            continue
        reached.update(node.output)
        counts["ops"] += 1
        counts["convs"] += node.op_type in ("Conv", "ConvTranspose")
        counts["norms"] += node.op_type == "BatchNormalization"
    return counts


def count_parameters(model: ModelProto) -> int:
    """Return how many floating values the constants of the main graph hold."""
    floating = {number for number, dtype in DTYPES.items() if dtype.is_floating_point}
    return sum(prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floating)
