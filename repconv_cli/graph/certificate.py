"""The proof of a block: one float64 run of the original sub-graph against the one operator.

Two affine maps that agree at one random point agree everywhere, with probability one: the points where different
affine maps agree have measure zero. So the difference at one random input, borders included, is a proof up to
rounding, for that geometry. Where a size is free there is a geometry for each remainder by the stride.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.algebra.slabs import Weight
from repconv_cli.errors import UnprovenError
from repconv_cli.finite import is_finite, largest
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.interpret import channels_last, is_large_layer, run_in_slabs, run_layer, run_node, to_double
from repconv_cli.graph.places import Place, small_places, traced_and_others
from repconv_cli.graph.rewrite import Fusion
from repconv_cli.graph.rules import aten

LIMIT = 1e-12


@dataclass(frozen=True)
class Certificate:
    """The largest difference, relative to ``sum |w||x| + |b|`` over the branches, of any single output value."""

    error: float
    geometries: int
    limit: float = LIMIT

    @property
    def is_proof(self) -> bool:
        """Whether the block computes what its branches compute, up to float64 rounding."""
        return self.error <= self.limit


def certify(
    fusion: Fusion, constants: Constants, seed: int = 0, tensors: Callable[[], dict[str, Weight]] | None = None
) -> Certificate:
    """Return the certificate of ``fusion``; ``tensors`` gives its float64 tensors.

    It is called when the branches have run, so that only one of the two holds float64 weights at a time.
    Raises :class:`UnprovenError` if it proves a difference, or if there is no place to prove it at.
    """
    region = region_between(fusion.block.anchor, fusion.block.node, constants)
    operator = _emitted(fusion)
    expected = _run_branches(small_places(fusion.block, region, operator, constants), region, fusion, seed)
    if expected is None:
        # The region does not run at small sizes, such as one that crops at a place counted in pixels.
        expected = _run_branches(traced_and_others(fusion.block.anchor, constants), region, fusion, seed)
    if not expected:
        raise UnprovenError(f"block {fusion.block.name}: it runs at the traced size alone, though that is free")
    run = _as_callable(operator, (tensors or fusion.tensors)())
    certificate = Certificate(max(_error(run, values) for values in expected), len(expected))
    if not certificate.is_proof:
        raise UnprovenError(
            f"block {fusion.block.name}: one operator differs from its branches by {certificate.error:.1e} of scale",
            needed=f"at most {LIMIT:.0e}",
        )
    return certificate


@dataclass(frozen=True)
class _Values:
    """What the branches make of one random input, and the magnitude of what they sum for each value."""

    x: Tensor
    y: Tensor
    scale: Tensor


def _run_branches(places: list[Place], region: list[fx.Node], fusion: Fusion, seed: int) -> list[_Values] | None:
    """Return what the branches compute at each place; None where the region does not run there."""
    values = []
    for index, (shape, constants) in enumerate(places):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + index), dtype=torch.float64)
        with torch.no_grad():
            try:
                y, scale = _run(region, x, fusion, constants)
            except (RuntimeError, IndexError):
                return None
            values.append(_Values(x, y, scale))
    return values


def _error(operator: Callable[[Tensor], Tensor], branches: _Values) -> float:
    """Return the largest difference, relative to the magnitude of what was summed, value by value."""
    with torch.no_grad():
        try:
            found = operator(branches.x)
        except (RuntimeError, IndexError):
            return float("inf")
    if found.shape != branches.y.shape:
        return float("inf")
    difference = found - branches.y
    if not is_finite(difference):
        return float("inf")
    # Where nothing was summed nothing may differ; elsewhere the smallest scale that float64 can resolve.
    return largest(difference.div_(branches.scale.clamp_min(torch.finfo(torch.float64).tiny)))


def _run(region: list[fx.Node], x: Tensor, fusion: Fusion, constants: Constants) -> tuple[Tensor, Tensor]:
    """Return the value of the region at ``x`` and its magnitude, node by node, each dropped after its last use."""
    values: dict[fx.Node, Any] = {fusion.block.anchor: x}
    magnitudes: dict[fx.Node, Any] = {fusion.block.anchor: x.abs()}
    last_use = {source: node for node in region for source in node.all_input_nodes}
    for node in region:
        values[node], magnitudes[node] = _run_node(node, values, magnitudes, constants)
        for source in node.all_input_nodes:
            if last_use[source] is node:
                values.pop(source, None)
                magnitudes.pop(source, None)
    return values[fusion.block.node], magnitudes[fusion.block.node]


def _run_node(
    node: fx.Node, values: dict[fx.Node, Any], magnitudes: dict[fx.Node, Any], constants: Constants
) -> tuple[Any, Any]:
    read = {source: constants.as_stored(source) for source in node.all_input_nodes if source not in values}
    args: Any = map_arg(node.args, lambda n: values[n] if n in values else read[n])
    if is_large_layer(node, args):
        return _run_in_slabs(node, args, magnitudes[node.args[0]])  # type: ignore[index]
    cast = {source: to_double(value) for source, value in read.items()}

    def spent(source: fx.Node) -> Any:
        # Given up at its last use, so that a large weight is there twice only while its magnitude is taken.
        return cast.pop(source) if source in cast else constants.value(source)

    value = run_node(node, lambda n: values[n] if n in values else cast[n])
    return value, run_magnitude(node, lambda n: magnitudes[n] if n in magnitudes else spent(n))


def _run_in_slabs(node: fx.Node, args: tuple[Any, ...], magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value and the magnitude of a large layer, its weight cast once for both."""
    x, magnitude = channels_last(args[0]), channels_last(magnitude)

    def run(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        value = run_layer(node, x, weight, bias, *args[3:])
        # A cast of this layer's alone, and not needed any more.
        return value, run_layer(node, magnitude, weight.abs_(), None if bias is None else bias.abs(), *args[3:])

    value, size = run_in_slabs(node, args, run)
    return value, size


def run_magnitude(node: fx.Node, fetch: Callable[[fx.Node], Any]) -> Any:
    """Return ``sum |w||x| + |b|`` of a node: its operator with absolute constants, and sums for differences."""

    def absolute(value: Any) -> Any:
        found = fetch(value) if isinstance(value, fx.Node) else value
        if not (isinstance(found, Tensor) and found.is_floating_point()):
            return found
        # Where the cast makes a copy, no second one is needed.
        double: Tensor = to_double(found)
        return double.abs() if double is found else double.abs_()

    operands: tuple[Any, ...] = tuple(node.args)
    if node.target is aten.batch_norm.default:
        return _norm_magnitude(operands, absolute, fetch)
    if node.target in _SUMS:
        alpha: Any = operands[2] if len(operands) > 2 else node.kwargs.get("alpha", 1)
        return (abs(absolute(operands[0])) + abs(absolute(operands[1]))) * max(1.0, abs(alpha))
    if node.target is aten.neg.default:
        return absolute(operands[0])
    value = run_node(node, absolute)
    return value.abs() if isinstance(value, Tensor) else value


# Also plain sums: a number added may be negative.
_SUMS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar}


def _norm_magnitude(
    operands: tuple[Any, ...], absolute: Callable[[Any], Any], fetch: Callable[[fx.Node], Any]
) -> Tensor:
    x, gamma, beta, mean, var, _, _, eps = operands[:8]
    scale = torch.rsqrt(to_double(fetch(var)) + eps)
    if gamma is not None:
        scale = scale * absolute(gamma)
    shift = absolute(mean) * scale
    if beta is not None:
        shift = shift + absolute(beta)
    value: Tensor = absolute(x)
    column = (-1, *(1,) * (value.ndim - 2))
    magnitude: Tensor = value * scale.reshape(column) + shift.reshape(column)
    return magnitude


def _emitted(fusion: Fusion) -> fx.Graph:
    """Return the emitted operator alone, as it stands in the new graph."""
    graph = fx.Graph()
    graph.output(fusion.emit(graph, graph.placeholder("x")))
    return graph


def _as_callable(operator: fx.Graph, tensors: dict[str, Weight]) -> Callable[[Tensor], Tensor]:
    """Return the operator on float64 tensors."""

    def run(x: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {}
        for node in operator.nodes:
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = tensors[str(node.target)]
            elif node.op == "call_function":
                values[node] = run_node(node, lambda n: values[n])
        (result,) = operator.output_node().all_input_nodes
        found: Tensor = values[result]
        return found

    return run
