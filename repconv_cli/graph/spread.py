"""A norm over values side by side is a norm for each part: ``norm(cat(a, b)) = cat(norm_a(a), norm_b(b))``.

It computes each channel by itself, so it commutes with a concatenation of channels: the same arithmetic on the same
numbers. Where each part is a layer on an input of its own, as in MixNet, only so can the norm be folded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from repconv_cli.graph.analyse import is_convolution, is_norm
from repconv_cli.graph.interpret import Constants
from repconv_cli.graph.program import Program
from repconv_cli.graph.rules import aten


def spread_norms(program: Program, whole: Collection[str] = ()) -> tuple[Program, dict[str, tuple[str, ...]]]:
    """Return the same program with norms spread over layers side by side, and the names of each norm's parts.

    ``whole`` are the names of norms that stay as they are. Tensors are shared; nothing of ``program`` is changed.
    """
    cats = {norm: cat for norm in program.graph.nodes if (cat := _side_by_side(norm)) is not None}
    constants = Constants(program) if cats else None
    chosen = {
        norm: cat
        for norm, cat in cats.items()
        if constants is not None and norm.name not in whole and _is_of_layers(norm, cat, constants)
    }
    if not chosen:
        return program, {}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    parts: dict[str, tuple[str, ...]] = {}
    gone = set(chosen.values())
    for node in program.graph.nodes:
        if node in chosen:
            layers: list[fx.Node] = list(chosen[node].args[0])  # type: ignore[arg-type]
            norms = _norms(graph, node, layers, env)
            parts[node.name] = tuple(norm.name for norm in norms)
            env[node] = graph.call_function(aten.cat.default, (norms, 1))
            env[node].meta = dict(node.meta)
        elif node not in gone:
            env[node] = graph.node_copy(node, lambda source: env[source])
            env[node].meta = dict(node.meta)
    return replace(program, graph=graph), parts


def _norms(graph: fx.Graph, norm: fx.Node, layers: list[fx.Node], env: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Return a norm for each layer, of its own part of the statistics."""
    found, start = [], 0
    for layer in layers:
        stop = start + layer.meta["shape"][1]
        operands = [_part(graph, value, start, stop, env) for value in norm.args[1:5]]
        found.append(graph.call_function(aten.batch_norm.default, (env[layer], *operands, *norm.args[5:])))
        found[-1].meta = {**norm.meta, "shape": layer.meta["shape"], "free": layer.meta["free"]}
        start = stop
    return found


def _part(graph: fx.Graph, value: object, start: int, stop: int, env: dict[fx.Node, fx.Node]) -> fx.Node | None:
    if not isinstance(value, fx.Node):
        return None
    part = graph.call_function(aten.slice.Tensor, (env[value], 0, start, stop))
    part.meta = {**env[value].meta, "shape": (stop - start,), "free": (False,)}
    return part


def _side_by_side(norm: fx.Node) -> fx.Node | None:
    """Return the concatenation of channels that a norm in eval mode reads, and nobody else does."""
    if not is_norm(norm) or norm.args[5]:
        return None
    cat = norm.args[0]
    if not isinstance(cat, fx.Node) or cat.target is not aten.cat.default or len(cat.users) > 1:
        return None
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    return cat if isinstance(dim, int) and dim % len(norm.meta["shape"]) == 1 else None


def _is_of_layers(norm: fx.Node, cat: fx.Node, constants: Constants) -> bool:
    """Whether each part is a convolution of constant weight that nobody else reads: a norm always folds into one."""
    parts: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    return (
        all(value is None or value in constants for value in norm.args[1:5])
        and len(set(parts)) == len(parts) > 1
        and all(is_convolution(part) and part.args[1] in constants and len(part.users) == 1 for part in parts)
        and all(part.meta["dtype"] == norm.meta["dtype"] for part in parts)
    )
