"""A norm folded into a layer across operators that are no part of one with them, such as an average over tokens.

The operators between stay as they are, the norms go, and the layer takes new tensors. That the norms commute with what
lies between is not looked up anywhere: the block's certificate proves it.
"""

from __future__ import annotations

from collections.abc import Set
from math import prod
from typing import Any

from torch import fx

from repconv_cli.graph.analyse import is_convolution
from repconv_cli.graph.rewrite import Emit
from repconv_cli.graph.rules import aten


def without_norms(region: list[fx.Node], anchor: fx.Node, norms: Set[fx.Node], keys: tuple[str, str]) -> Emit | None:
    """Return what writes ``region`` without its norms, the layer at its end with the tensors of ``keys``.

    None, if the last operator is no layer, or if some operator reads what is neither in the region nor stored.
    """
    layer = region[-1]
    if not (is_convolution(layer) or layer.target is aten.linear.default) or not _is_replayable(region, anchor):
        return None

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        env: dict[Any, Any] = {anchor: x}
        for node in region[:-1]:
            start = _flattened_from(node)
            if node in norms:
                env[node] = env[node.args[0]]
                continue
            if start is not None:
                env[node] = graph.call_function(aten.flatten.using_ints, (env[node.args[0]], start))
            else:
                env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
        weight, bias = (graph.get_attr(key) for key in keys)
        rest: Any = layer.args[3:]
        return graph.call_function(layer.target, (env[layer.args[0]], weight, bias, *rest))  # type: ignore[arg-type]

    return emit


def _is_replayable(region: list[fx.Node], anchor: fx.Node) -> bool:
    """Whether ``region`` reads nothing but itself, its anchor and what its norms and its layer have stored."""
    known = {anchor, *region}
    return all(
        source in known or source.op == "get_attr" or _flattened_from(node) is not None
        for node in region
        for source in node.all_input_nodes
    )


def _flattened_from(node: fx.Node) -> int | None:
    """Return the first of the axes that a reshape lays together, if that is all it does: it needs no sizes then."""
    if node.target is not aten.reshape.default or not isinstance(node.args[0], fx.Node):
        return None
    before, after = node.args[0].meta["shape"], node.meta["shape"]
    start = len(after) - 1
    is_flat = len(before) > len(after) and before[:start] == after[:start] and prod(before[start:]) == after[-1]
    return start if is_flat and start else None
