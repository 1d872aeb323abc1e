"""Convolutions, norms and moves around a fully connected layer, as one layer: ``fc(flatten(x)) + conv(x)``.

A layer that reads all values of a sample (or of a partition of it) is a matrix on runs of consecutive values. At known
sizes everything else that is affine is one as well: a convolution unrolled over its positions, whose taps in the
padding vanish, a norm spread over them. Reshapes keep the order of values, so they change nothing at all. What a run
becomes is known from integers alone; the matrix is the Jacobian of the operators, made only for what is taken.

Reference: Ding et al. 2021, *RepMLP: Re-parameterizing Convolutions into Fully-connected Layers*, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import Axis, ConvMap, Geometry
from repconv_cli.errors import UnprovenError
from repconv_cli.graph.arrange import Size
from repconv_cli.graph.interpret import Constants, region_between, run_node
from repconv_cli.graph.recipe import Recipe
from repconv_cli.graph.rules import Step, aten
from repconv_cli.graph.term import Anchor, Term

# How many values one node may have while its Jacobian is made, in rows of samples at once.
_MOST_VALUES = 2**19

_SAME_ORDER = {
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default,
    aten.dropout.default,
}  # fmt: skip
_ON_EACH_VALUE = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.addcmul.default,
}  # fmt: skip
_PERMUTES = {aten.permute.default, aten.transpose.int}
_IN_SAMPLES = {aten.batch_norm.default, aten.cat.default, aten.slice.Tensor}


@dataclass(frozen=True)
class Work:
    """What an operator does: of ``reads[i]`` consecutive values of its i-th input it makes ``gives`` of its own.

    The same map for all of them, in ``pieces`` equal parts that do not read each other's values. ``axes`` is the
    number of spatial axes of a layer that reads a single position, None for anything else.
    """

    reads: tuple[int, ...] = (1,)
    gives: int = 1
    pieces: int = 1
    is_layer: bool = False
    axes: int | None = None


@dataclass(frozen=True)
class Rows:
    """A node as one matrix that makes ``outputs`` of its values from ``inputs`` of its anchor's, row by row.

    Both lie in order, so all values of the anchor, cut into rows of ``inputs``, give all values of the node.
    ``groups`` is the number of equal blocks along the matrix' diagonal, outside of which it is zero. ``axes`` tells
    how a layer that reads a whole row is written: as linear (0) or as a convolution over so many axes of size 1.
    """

    inputs: int = 1
    outputs: int = 1
    groups: int = 1
    layers: int = 0
    axes: int | None = None

    def times(self, count: int) -> Rows:
        """Return the same map on rows that are ``count`` times as long: as many blocks along the diagonal."""
        if count == 1:
            return self
        return replace(
            self, inputs=count * self.inputs, outputs=count * self.outputs, groups=count * self.groups, axes=None
        )


@dataclass(frozen=True, eq=False)
class Unrolled(Term):
    """A term on its anchor's values in rows; ``before`` and ``after`` are shapes to bring values to, None where they
    have them."""

    before: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None

    @property
    def reshapes(self) -> int:
        """How many operators bring values to rows and back."""
        return (self.before is not None) + (self.after is not None)


def rows_on_anchors(
    node: fx.Node, step: Step, known: Mapping[fx.Node, Mapping[fx.Node, Rows]], constants: Constants, most: int
) -> dict[fx.Node, Rows]:
    """Return ``node``'s rows on the nearest anchors that all its inputs have, at most so many."""
    work = _work(node, step, constants)
    if work is None or any(source not in known for source in step.inputs):
        return {}
    first, *others = (known[source] for source in step.inputs)
    shared = (anchor for anchor in first if all(anchor in other for other in others))
    found = ((anchor, _through(work, [known[source][anchor] for source in step.inputs])) for anchor in shared)
    return dict(islice(((anchor, rows) for anchor, rows in found if rows is not None), most))


def _through(work: Work, rows: list[Rows]) -> Rows | None:
    """Return the rows of what ``work`` makes of ``rows``; None where one would be cut."""
    longest = 0
    for row, reads in zip(rows, work.reads, strict=True):
        if row.outputs % reads and reads % row.outputs:
            return None
        longest = max(longest, row.inputs * max(reads // row.outputs, 1))
    if any(longest % row.inputs for row in rows):
        return None
    rows = [row.times(longest // row.inputs) for row in rows]
    counts = {row.outputs // reads for row, reads in zip(rows, work.reads, strict=True)}
    if len(counts) > 1:
        return None
    count = counts.pop()
    written = [row.axes for row in rows if row.axes is not None]
    if count == 1 and work.axes is not None:
        written = [work.axes]
    return Rows(
        longest,
        count * work.gives,
        gcd(count * work.pieces, *(row.groups for row in rows)),
        sum(row.layers for row in rows) + work.is_layer,
        max(written, default=None),
    )


def _work(node: fx.Node, step: Step, constants: Constants) -> Work | None:
    """Return what ``node`` does to consecutive values, None where samples or free sizes are mixed up with them."""
    if node.target in _SAME_ORDER:
        return Work()
    if node.target in _ON_EACH_VALUE and _is_same_everywhere(node, constants):
        return Work((1,) * len(step.inputs))
    if node.target is aten.linear.default and step.leaf is not None:
        geometry = step.leaf.geometry
        return Work((geometry.in_channels,), geometry.out_channels, is_layer=True, axes=0)
    if any(any(n.meta["free"][1:]) for n in (node, *step.inputs)):
        return None
    work = Work(tuple(prod(n.meta["shape"][1:]) for n in step.inputs), prod(node.meta["shape"][1:]))
    if step.leaf is not None:
        is_one_place = all(size == 1 for n in (node, *step.inputs) for size in n.meta["shape"][2:])
        axes = len(step.leaf.geometry.axes) if step.leaf.is_layer and is_one_place else None
        pieces = step.leaf.geometry.groups
        return replace(work, pieces=pieces, is_layer=step.leaf.is_layer, axes=axes)
    if node.target in _ON_EACH_VALUE or node.target is aten.batch_norm.default:
        return replace(work, pieces=work.gives) if _is_per_channel(node, constants) else None
    if node.target in _PERMUTES:
        return work if _keeps_samples(node) else None
    return work if node.target in _IN_SAMPLES else None


def _tensors(node: fx.Node, constants: Constants) -> list[tuple[int, ...]]:
    """Return the shapes of the constants that ``node`` reads, but for single numbers."""
    shapes = [tuple(n.meta["shape"]) for n in node.all_input_nodes if n in constants and "shape" in n.meta]
    return [shape for shape in shapes if prod(shape) > 1]


def _is_same_everywhere(node: fx.Node, constants: Constants) -> bool:
    variables = [n for n in node.all_input_nodes if n not in constants]
    return not _tensors(node, constants) and all(n.meta["shape"] == node.meta["shape"] for n in variables)


def _is_per_channel(node: fx.Node, constants: Constants) -> bool:
    """Whether no constant has an axis for the samples, of which there may be others than at the example."""
    ndim = len(node.meta["shape"])
    return all(len(shape) < ndim or shape[0] == 1 for shape in _tensors(node, constants))


def _keeps_samples(node: fx.Node) -> bool:
    ndim = len(node.meta["shape"])
    if node.target is aten.permute.default:
        return bool(node.args[1][0] % ndim == 0)  # type: ignore[index, operator]
    return all(axis % ndim for axis in node.args[1:3])  # type: ignore[operator]


def unrolled(node: fx.Node, anchor: fx.Node, rows: Rows, constants: Constants) -> tuple[Anchor, Unrolled] | None:
    """Return ``node`` as one layer on the rows of ``anchor``, None where no layer reads a whole row.

    It is written as a linear layer, or a convolution of as many groups as there are blocks. No kernel is computed.
    """
    if rows.axes is None:
        return None
    ones, shape = (1,) * rows.axes, tuple(zip(node.meta["shape"], node.meta["free"], strict=True))
    leading: tuple[Size, ...] = ((_count(anchor) // rows.inputs, any(anchor.meta["free"])),)
    is_in_rows = anchor.meta["shape"][1:] == (rows.inputs, *ones)
    if not ones and anchor.meta["shape"][-1] == rows.inputs:
        is_in_rows, leading = True, tuple(zip(anchor.meta["shape"][:-1], anchor.meta["free"][:-1], strict=True))
    given = (*leading, (rows.outputs, False), *((1, False) for _ in ones))
    if given != shape and sum(is_free for _, is_free in shape) > 1:
        return None  # a reshape finds one size by itself
    geometry = Geometry(rows.outputs, rows.inputs, rows.groups if ones else 1, (Axis(),) * rows.axes)
    term = Unrolled(
        1,
        geometry,
        Recipe(lambda _: _matrix(node, anchor, geometry, constants)),
        convolutions=rows.layers,
        # A pool before a classifier is nothing that somebody would expect to be fused.
        kernels=rows.layers,
        before=None if is_in_rows else (-1, rows.inputs, *ones),
        after=None if given == shape else tuple(-1 if is_free else size for size, is_free in shape),
    )
    at = Anchor(anchor, (_count(anchor) // rows.inputs, rows.inputs, *ones), (True, False, *(False for _ in ones)))
    return at, term


def _matrix(node: fx.Node, anchor: fx.Node, geometry: Geometry, constants: Constants) -> ConvMap:
    """Return the Jacobian and the constant of ``node`` on one row of ``anchor``, a row of it for each output.

    All groups at once: ``weight[g, o, i] = d y[g, o] / d x[g, i]``.
    """
    region = region_between(anchor, node, constants)
    groups, outputs, inputs = geometry.groups, geometry.out_channels, geometry.in_channels
    rows = _count(anchor) // inputs
    width = max(_count(n) for n in (anchor, *region)) // rows
    height = outputs // groups
    at_once = max(min(_MOST_VALUES // max(width, 1), height), 1)
    weight = torch.zeros(groups, height, inputs // groups, dtype=torch.float64)
    with torch.enable_grad():
        x = torch.zeros(at_once, inputs, dtype=torch.float64, requires_grad=True)
        try:
            y = _run(region, anchor, x, constants)
        except RuntimeError as error:
            raise UnprovenError(f"{node.name} does not run on rows of {anchor.name}: {error}") from error
        for first in range(0, height, at_once):
            count = min(at_once, height - first)
            cotangent = torch.zeros(at_once, groups, height, dtype=torch.float64)
            cotangent[range(count), :, range(first, first + count)] = 1.0
            (found,) = torch.autograd.grad(y, x, cotangent.flatten(1), retain_graph=True)
            weight[:, first : first + count] = found[:count].reshape(count, groups, -1).transpose(0, 1)
    return ConvMap(weight.reshape(geometry.weight_shape), y[0].detach().clone(), geometry)


def _count(node: fx.Node) -> int:
    """Return how many values ``node`` has at the example."""
    return prod(node.meta["shape"])


def _run(region: Iterable[fx.Node], anchor: fx.Node, x: Tensor, constants: Constants) -> Tensor:
    """Return the last node's values in rows, for rows ``x`` of the anchor."""
    values = {anchor: x}
    y = x
    for node in region:
        is_on_values = node.target in _ON_EACH_VALUE and _is_same_everywhere(node, constants)

        def fetch(source: fx.Node, node: fx.Node = node, is_on_values: bool = is_on_values) -> Any:
            if source not in values:
                return constants.as_stored(source)
            if is_on_values:
                return values[source]
            shape = source.meta["shape"]
            return values[source].reshape(-1, *(shape[-1:] if node.target is aten.linear.default else shape[1:]))

        if node.target in _SAME_ORDER:
            (source,) = (n for n in node.all_input_nodes if n in values)
            y = values[source]
        else:
            y = run_node(node, fetch).reshape(len(x), -1)
        values[node] = y
    return y
