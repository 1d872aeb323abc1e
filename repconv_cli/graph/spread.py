"""A norm moved past what it commutes with, to where it can be folded; it computes each channel by itself.

Over values side by side it is a norm for each part: ``norm(cat(a, b)) = cat(norm_a(a), norm_b(b))``. Where each part is
a layer on an input of its own, as in MixNet, only so can the norm be folded. Before an average it is one behind it,
``mean(norm(x)) = norm(mean(x))``, as an affine map of an average is the average of the affine maps: so it reaches a
classifier, as in StarNet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from repconv_cli.graph.analyse import is_convolution, is_norm
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.program import Program
from repconv_cli.graph.rules import aten

_ADAPTIVE_POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}


def spread_norms(program: Program, whole: Collection[str] = ()) -> tuple[Program, dict[str, tuple[str, ...]]]:
    """Return the same program with norms moved to where they can be folded, and the names of what each became.

    ``whole`` are the names of norms that stay as they are. Tensors are shared; nothing of ``program`` is changed.
    """
    constants = Constants(program)
    norms = [node for node in program.graph.nodes if _may_move(node, constants) and node.name not in whole]
    cats = {norm: cat for norm in norms if (cat := _side_by_side(norm, constants)) is not None}
    averages = {average: norm for norm in norms if (average := _average_of(norm)) is not None}
    if not cats and not averages:
        return program, {}
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    parts: dict[str, tuple[str, ...]] = {}
    gone = {*cats.values(), *averages.values()}
    for node in program.graph.nodes:
        if node in cats:
            layers: list[fx.Node] = list(cats[node].args[0])  # type: ignore[arg-type]
            moved = _norms(graph, node, layers, env)
            parts[node.name] = tuple(norm.name for norm in moved)
            env[node] = graph.call_function(aten.cat.default, (moved, 1))
            env[node].meta = dict(node.meta)
        elif node in averages:
            env[node] = _behind(graph, averages[node], node, env)
            parts[averages[node].name] = (env[node].name,)
        elif node not in gone:
            env[node] = graph.node_copy(node, lambda source: env[source])
            env[node].meta = dict(node.meta)
    return replace(program, graph=graph), parts


def _behind(graph: fx.Graph, norm: fx.Node, average: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return the norm of the average of what ``norm`` reads."""
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    mean = graph.node_copy(average, lambda source: env[x if source is norm else source])
    mean.meta = dict(average.meta)
    operands = [env[value] if isinstance(value, fx.Node) else value for value in norm.args[1:5]]
    found = graph.call_function(aten.batch_norm.default, (mean, *operands, *norm.args[5:]))
    found.meta = {**norm.meta, "shape": average.meta["shape"], "free": average.meta["free"]}
    return found


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


def _may_move(node: fx.Node, constants: Constants) -> bool:
    """Whether ``node`` is a norm in eval mode with constant statistics."""
    return is_norm(node) and not node.args[5] and all(v is None or v in constants for v in node.args[1:5])


def _side_by_side(norm: fx.Node, constants: Constants) -> fx.Node | None:
    """Return the concatenation of layers' channels that a norm reads, and nobody else does."""
    cat = norm.args[0]
    if not isinstance(cat, fx.Node) or cat.target is not aten.cat.default or len(cat.users) > 1:
        return None
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    is_of_channels = isinstance(dim, int) and dim % len(norm.meta["shape"]) == 1
    return cat if is_of_channels and _is_of_layers(norm, cat, constants) else None


def _is_of_layers(norm: fx.Node, cat: fx.Node, constants: Constants) -> bool:
    """Whether each part is a convolution of constant weight that nobody else reads: a norm always folds into one."""
    parts: list[fx.Node] = list(cat.args[0])  # type: ignore[arg-type]
    return (
        len(set(parts)) == len(parts) > 1
        and all(is_convolution(part) and part.args[1] in constants and len(part.users) == 1 for part in parts)
        and all(part.meta["dtype"] == norm.meta["dtype"] for part in parts)
    )


def _average_of(norm: fx.Node) -> fx.Node | None:
    """Return the average over positions that alone reads a norm, which no convolution before it can take."""
    before, (average, *others) = norm.args[0], list(norm.users) or [norm]
    assert isinstance(before, fx.Node)
    if (
        others
        or is_convolution(before)
        or average.args[:1] != (norm,)
        or average.meta.get("dtype") != norm.meta["dtype"]
    ):
        return None
    if average.target in _ADAPTIVE_POOLS:
        # Without an axis for samples, it would take that of the channels for one of positions.
        return average if len(norm.meta["shape"]) == _ADAPTIVE_POOLS[average.target] + 2 else None
    if average.target is not aten.mean.dim:
        return None
    ndim, dims = len(norm.meta["shape"]), average.args[1]
    over = {dim % ndim for dim in dims} if isinstance(dims, (list, tuple)) and dims else {0}  # type: ignore[operator]
    return average if over.isdisjoint((0, 1)) else None
