"""One walk over the graph: the term of each node relative to each anchor that it can be expressed on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod

from torch import fx

from repconv_cli.algebra import Geometry
from repconv_cli.errors import InexactError
from repconv_cli.graph.arrange import PERMUTES, Move, order_of, scatters
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.probe import linear_sources, probed_step
from repconv_cli.graph.program import Program, is_computation
from repconv_cli.graph.rules import Step, aten, describe
from repconv_cli.graph.term import Anchor, Term
from repconv_cli.graph.unroll import Rows, Unrolled, rows_on_anchors, unrolled
from repconv_cli.graph.written import can_be_padded, moves_after, pads_itself, written_geometry

# A node is expressed on its nearest anchors only, so that a long chain of linear operators costs linear time.
MAX_ANCHORS = 16


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of the traced example, all its samples, operations, how many are layers, their weights.

    ``scattered`` are the operations that move values one by one; see :func:`~repconv_cli.graph.arrange.scatters`.
    """

    macs: int = 0
    ops: int = 0
    layers: int = 0
    weights: int = 0
    scattered: int = 0

    @property
    def passes(self) -> int:
        """Operations by what they take: one that moves values one by one takes longer than two others."""
        return self.ops + self.scattered

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.ops + other.ops,
            self.layers + other.layers,
            self.weights + other.weights,
            self.scattered + other.scattered,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.macs - other.macs,
            self.ops - other.ops,
            self.layers - other.layers,
            self.weights - other.weights,
            self.scattered - other.scattered,
        )

    def is_gain(self) -> bool:
        """Whether to save this is one: fewer passes over the values, with no more work and no more layers.

        Two halves of a convolution do its work without the slices that followed, and run slower than it. More weights
        are bought by less work alone: a 1x1 before a pool of 2x2 is a convolution with four times as many of them.
        """
        pays = self.macs > 0 or self.weights >= 0
        return self.macs >= 0 and self.passes > 0 and self.layers >= 0 and pays

    def per_sample(self, samples: int) -> Cost:
        """Return the cost of one of ``samples``."""
        return replace(self, macs=self.macs // samples)


@dataclass(frozen=True)
class Candidate:
    """A node as one operator on an anchor, and what that would cost."""

    anchor: Anchor
    term: Term
    cost: Cost


@dataclass(frozen=True)
class Analysis:
    """What is known of each node: its step, its candidates by anchor, and why a rule did not hold."""

    constants: Constants
    samples: int = 1
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    candidates: dict[fx.Node, dict[fx.Node, Candidate]] = field(default_factory=dict)
    reasons: dict[fx.Node, list[str]] = field(default_factory=dict)
    unproven: dict[fx.Node, str] = field(default_factory=dict)

    def refuse(self, node: fx.Node, anchor: fx.Node, reason: str) -> None:
        """Take away a candidate whose proof failed."""
        self.candidates[node].pop(anchor, None)
        self.unproven[node] = reason


def analyse(program: Program) -> Analysis:
    """Return the terms of every node of ``program``. No kernel is computed but of what no rule knows."""
    analysis = Analysis(Constants(program), program.samples())
    available: dict[fx.Node, dict[fx.Node, Term]] = {}
    affine: dict[fx.Node, list[fx.Node]] = {}
    rows: dict[fx.Node, dict[fx.Node, Rows]] = {}
    failed: set[tuple[str | None, int]] = set()
    for node in program.graph.nodes:
        if node in analysis.constants:
            continue
        affine[node] = _affine_anchors(node, affine, analysis.constants)
        if "shape" not in node.meta:
            continue
        available[node] = {node: Term()}
        terms = _described(node, available, analysis)
        rows[node] = {node: Rows()} | _rows(node, rows, analysis)
        if all(term.layout is not None for term in terms.values()):
            probed = probed_step(node, affine[node], analysis.constants, failed)
            if probed is not None:
                analysis.reasons.pop(node, None)
                found = _combine(node, probed, available, analysis)
                region = region_between(probed.inputs[0], node, analysis.constants)
                # The steps are walked from a block's end to its anchor: by rules all the way, or in one leap.
                if any(n not in analysis.steps for n in region):
                    analysis.steps[node], terms = probed, {}
                    rows[node] = {node: Rows()}
                terms = found | terms
        candidates = ((a, _candidate(Anchor.of(a), term, program.pads_unevenly)) for a, term in terms.items())
        analysis.candidates[node] = {a: candidate for a, candidate in candidates if candidate is not None}
        analysis.candidates[node] |= _unrolled_candidates(node, rows[node], terms, analysis, program.pads_unevenly)
        available[node] |= terms
    return analysis


def _rows(node: fx.Node, rows: dict[fx.Node, dict[fx.Node, Rows]], analysis: Analysis) -> dict[fx.Node, Rows]:
    step = analysis.steps.get(node)
    return {} if step is None else rows_on_anchors(node, step, rows, analysis.constants, MAX_ANCHORS)


def _unrolled_candidates(
    node: fx.Node, rows: dict[fx.Node, Rows], terms: dict[fx.Node, Term], analysis: Analysis, pads_unevenly: bool
) -> dict[fx.Node, Candidate]:
    """Return ``node`` as one layer on whole rows of anchors on which it is no convolution over positions."""
    found: dict[fx.Node, Candidate] = {}
    for anchor, row in rows.items():
        pair = unrolled(node, anchor, row, analysis.constants, analysis.steps) if anchor not in terms else None
        candidate = None if pair is None else _candidate(*pair, pads_unevenly)
        if candidate is not None:
            found[anchor] = candidate
    return found


def _affine_anchors(node: fx.Node, affine: dict[fx.Node, list[fx.Node]], constants: Constants) -> list[fx.Node]:
    """Return the nearest tensors that ``node`` is an affine function of, by whatever operators; itself first."""
    first, *others = [affine[source] for source in linear_sources(node, constants) or ()] or [[]]
    shared = (anchor for anchor in first if "shape" in anchor.meta and all(anchor in other for other in others))
    return [node, *islice(shared, MAX_ANCHORS)]


def _described(node: fx.Node, available: dict[fx.Node, dict[fx.Node, Term]], analysis: Analysis) -> dict[fx.Node, Term]:
    """Return the terms that the rule of ``node``'s operator gives, none where there is none."""
    try:
        step = describe(node, analysis.constants)
    except InexactError as reason:
        analysis.reasons[node] = [reason.found]
        return {}
    if step is None or any(source not in available for source in step.inputs):
        return {}
    analysis.steps[node] = step
    return _combine(node, step, available, analysis)


def _combine(
    node: fx.Node, step: Step, available: dict[fx.Node, dict[fx.Node, Term]], analysis: Analysis
) -> dict[fx.Node, Term]:
    """Return ``node``'s term on each anchor that all its inputs have, nearest first."""
    first, *others = (available[source] for source in step.inputs)
    terms: dict[fx.Node, Term] = {}
    for anchor in first:
        if len(terms) == MAX_ANCHORS:
            break
        if any(anchor not in other for other in others) or anchor.meta["dtype"] != node.meta["dtype"]:
            continue
        try:
            term = step.combine(tuple(available[source][anchor] for source in step.inputs), Anchor.of(anchor))
        except InexactError as reason:
            analysis.reasons.setdefault(node, []).append(reason.found)
            continue
        terms[anchor] = term
        if term.offset.ndim > 1:
            analysis.reasons.setdefault(node, []).append("a constant that differs at the border")
    return terms


def _candidate(anchor: Anchor, term: Term, pads_unevenly: bool) -> Candidate | None:
    """Return ``term`` with its cost; None for pads and pools alone, which no convolution should replace."""
    cost = _cost_of_term(term, anchor, pads_unevenly)
    return None if cost is None else Candidate(anchor, term, cost)


def _cost_of_term(term: Term, anchor: Anchor, pads_unevenly: bool) -> Cost | None:
    """Return what one operator (two with explicit padding, none for the anchor itself) would cost."""
    if term.offset.ndim > 1:
        return None
    moved = Cost(0, term.reshapes) if isinstance(term, Unrolled) else _cost_of_moves(moves_after(term, anchor))
    if term.keeps_values():
        return moved
    if term.axis is None or term.geometry is None:
        return moved + Cost(0, 1)
    geometry = written_geometry(term, anchor)
    if not term.convolutions:
        return moved + Cost(0, 1) if geometry.is_diagonal() else None
    if not can_be_padded(geometry, anchor.sizes(term.axis)):
        return None
    macs = geometry.multiply_accumulates(anchor.example_sizes(term.axis)) * anchor.positions(term.axis)
    pads = pads_itself(term, anchor) or (pads_unevenly and _pads_zeros(geometry, anchor.sizes(term.axis)))
    return moved + Cost(macs, 1 if pads else 2, 1, geometry.parameters)


def _cost_of_moves(found: list[Move]) -> Cost:
    scattered = sum(target is aten.permute.default and scatters(order) for target, (order, *_) in found)
    return Cost(0, len(found), scattered=scattered)


def _pads_zeros(geometry: Geometry, sizes: tuple[int | None, ...]) -> bool:
    """Whether all that is needed around the input are zeros, and no side is cropped."""
    reads_mode = geometry.padding_mode != "zeros" and geometry.reads_outside(sizes)
    return not reads_mode and all(min(axis.low, axis.high) >= 0 for axis in geometry.axes)


def cost_of_node(node: fx.Node, steps: dict[fx.Node, Step]) -> Cost:
    """Return what ``node`` costs as it stands in the graph."""
    if not is_computation(node):
        return Cost()
    step = steps.get(node)
    if step is not None and step.leaf is not None and step.leaf.is_layer:
        shape = step.inputs[0].meta["shape"]
        geometry, axes = step.leaf.geometry, step.leaf.geometry.axes
        positions = shape[0] if axes else prod(shape[:-1])
        if step.leaf.transposes:
            # Each input position is multiplied with the whole kernel, also at stride 1.
            return Cost(geometry.parameters * prod(shape[2:]) * positions, 1, 1, geometry.parameters)
        macs = geometry.multiply_accumulates(shape[2:] if axes else ()) * positions
        return Cost(macs, 1, 1, geometry.parameters)
    if node.target in PERMUTES:
        return Cost(0, 1, scattered=int(scatters(order_of(node))))
    return Cost(_other_macs(node), 1)


_MATRIX_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default, aten.baddbmm.default}


def _other_macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of a matrix product or a convolution that is no constant map."""
    if node.target is aten.einsum.default:
        return _einsum_macs(str(node.args[0]), [operand.meta["shape"] for operand in node.args[1]])  # type: ignore[union-attr]
    sources: list[tuple[int, ...]] = [
        a.meta["shape"] for a in node.args if isinstance(a, fx.Node) and "shape" in a.meta
    ]
    shape: tuple[int, ...] = node.meta.get("shape", (0, 0))
    values = prod(shape)
    if node.target in _MATRIX_PRODUCTS and len(sources) >= 2 and sources[-2]:
        return values * sources[-2][-1]
    if (is_convolution(node) or node.target is aten.linear.default) and len(sources) >= 2:
        return values * prod(sources[1][1:])
    return 0


def _einsum_macs(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """Return the product of all index sizes; an ellipsis counts as one index for each axis that it stands for."""
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.replace(" ", "").split("->")[0].split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after)
        names = [*before, *(f"...{index}" for index in range(hidden if dots else 0)), *after]
        sizes.update(zip(names, shape, strict=True))
    return prod(sizes.values())


def is_convolution(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution, plain or transposed."""
    return node.op == "call_function" and str(node.target).startswith("aten.conv")


def is_norm(node: fx.Node) -> bool:
    """Whether ``node`` is a batch norm."""
    return node.op == "call_function" and node.target is aten.batch_norm.default
