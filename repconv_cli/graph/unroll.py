"""Convolutions, norms and moves around a fully connected layer, as one layer: ``fc(flatten(x)) + conv(x)``.

A layer that reads all values of a sample (or of a partition of it) is a matrix on runs of consecutive values. At known
sizes everything else that is affine is one as well: a convolution unrolled over its positions, whose taps in the
padding vanish, a norm spread over them. Reshapes keep the order of values, so they change nothing at all. What a run
becomes is known from integers alone; the matrix is the Jacobian of the operators, made only for what is taken.

Reference: Ding et al. 2021, *RepMLP: Re-parameterizing Convolutions into Fully-connected Layers*, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import gcd, prod

from torch import fx

from repconv_cli.algebra import Axis, Geometry
from repconv_cli.graph.arrange import PERMUTES, Size, order_of
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.recipe import Recipe
from repconv_cli.graph.row_matrix import (
    ON_EACH_VALUE,
    count_values,
    is_same_everywhere,
    keeps_order,
    matrix_on_row,
    tensors_read,
)
from repconv_cli.graph.rules import Step, aten
from repconv_cli.graph.term import Anchor, Term

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
    if keeps_order(node):
        return Work()
    if node.target in ON_EACH_VALUE and is_same_everywhere(node, constants):
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
    if node.target in ON_EACH_VALUE or node.target is aten.batch_norm.default:
        return replace(work, pieces=work.gives) if _is_per_channel(node, constants) else None
    if node.target in PERMUTES:
        return work if order_of(node)[0] == 0 else None
    return work if node.target in _IN_SAMPLES else None


def _is_per_channel(node: fx.Node, constants: Constants) -> bool:
    """Whether no constant has an axis for the samples, of which there may be others than at the example."""
    ndim = len(node.meta["shape"])
    return all(len(shape) < ndim or shape[0] == 1 for shape in tensors_read(node, constants))


def unrolled(
    node: fx.Node, anchor: fx.Node, rows: Rows, constants: Constants, steps: Mapping[fx.Node, Step]
) -> tuple[Anchor, Unrolled] | None:
    """Return ``node`` as one layer on the rows of ``anchor``, None where no layer reads a whole row.

    It is written as a linear layer, or a convolution of as many groups as there are blocks. No kernel is computed.
    """
    if rows.axes is None:
        return None
    ones, shape = (1,) * rows.axes, tuple(zip(node.meta["shape"], node.meta["free"], strict=True))
    leading: tuple[Size, ...] = ((count_values(anchor) // rows.inputs, any(anchor.meta["free"])),)
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
        Recipe(lambda _: matrix_on_row(node, anchor, geometry, constants, steps)),
        convolutions=rows.layers,
        # A pool before a classifier is nothing that somebody would expect to be fused.
        kernels=rows.layers,
        before=None if is_in_rows else (-1, rows.inputs, *ones),
        after=None if given == shape else tuple(-1 if is_free else size for size, is_free in shape),
    )
    at = Anchor(
        anchor, (count_values(anchor) // rows.inputs, rows.inputs, *ones), (True, False, *(False for _ in ones))
    )
    return at, term
