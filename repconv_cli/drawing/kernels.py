"""A block's kernels, branch by branch on the taps of the fused one: what adds up to it."""

from __future__ import annotations

from math import prod

from torch import Tensor, fx

from repconv_cli.algebra import Geometry, embed
from repconv_cli.algebra.operations import reading
from repconv_cli.drawing.ranges import range_of
from repconv_cli.errors import InexactError, RepconvError
from repconv_cli.graph.analyse import Analysis
from repconv_cli.graph.kind import branches_of, listed
from repconv_cli.graph.plan import Block, Plan
from repconv_cli.graph.recipe import compute
from repconv_cli.graph.rules import aten
from repconv_cli.graph.term import Term
from repconv_cli.graph.terms import lift, scale_term
from repconv_cli.graph.unroll import Unrolled
from repconv_cli.graph.written import takeable_geometry
from repconv_cli.results import KernelFacts, Picture, RangeFacts

# A kernel larger than this is not drawn: it would take more memory than all the rest.
_MOST_WEIGHTS = 1 << 24
_MOST_TAPS = 1024
_MOST_BRANCHES = 12
_SIGNS = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}


def picture_of(block: Block, plan: Plan) -> Picture:
    """Return the kernels of ``block``'s branches and their sum, and the ranges of its weights."""
    try:
        return _picture(block, plan)
    except RepconvError as reason:
        # A picture that cannot be made is no reason to lose the result.
        return Picture(ranges_before=_ranges_before(block, plan), note=f"It cannot be drawn: {reason.found}.")


def _picture(block: Block, plan: Plan) -> Picture:
    ranges = _ranges_before(block, plan)
    term = block.choice.candidate.term
    if term.axis is None or term.recipe is None:
        return Picture(ranges_before=ranges, note="One factor for all channels: there is no kernel.")
    geometry = takeable_geometry(term, block.choice.candidate.anchor)
    extent = tuple(axis.kernel for axis in geometry.axes)
    if prod(geometry.weight_shape) > _MOST_WEIGHTS or prod(extent) > _MOST_TAPS:
        return Picture(ranges_before=ranges, note="This kernel is too large to be drawn.")
    fused = _on_taps(term, geometry, block)
    if not fused.numel():
        return Picture(ranges_before=ranges, note="Its kernel is empty.")
    pairs = _pairs(fused, geometry)
    parts = _parts_or_whole(block, plan.analysis)
    branches = [_facts(label, part, geometry, block, pairs) for label, part in parts]
    # As the block's kind names them: the largest kernel first, the identity last.
    branches.sort(key=lambda kernel: (kernel.label == "identity", -prod(kernel.extent)))
    key = f"{block.target}.weight"
    return Picture(
        taps=(prod(extent[:-1]), extent[-1]) if extent else (1, 1),
        pairs=pairs,
        branches=tuple(branches),
        fused=_kernel_facts("sum", fused, extent, pairs),
        ranges_before=ranges,
        range_after=range_of(key, fused, _output_axis(geometry)) if key in block.tensors else None,
    )


def _ranges_before(block: Block, plan: Plan) -> tuple[RangeFacts, ...]:
    tensors = [(key, plan.program.tensors[key]) for key in block.sources]
    # A scale is no weight, even where it is stored with axes of size 1.
    weights = [(key, t) for key, t in tensors if t.ndim > 3 or (t.ndim > 1 and t[0].numel() > 1)]
    return tuple(range_of(key, weight) for key, weight in weights if weight.is_floating_point() and weight.numel())


def _output_axis(geometry: Geometry) -> int:
    return 1 if geometry.transposed else 0


def _parts_or_whole(block: Block, analysis: Analysis) -> list[tuple[str, Term]]:
    """Return the terms that add up to the block's, each with its name; the whole where it cannot be taken apart."""
    whole = [(block.kind, block.choice.candidate.term)]
    if isinstance(block.choice.candidate.term, Unrolled):
        return whole
    branches = branches_of(block.node, block.anchor, analysis.steps)
    if branches.total() > _MOST_BRANCHES:
        return whole
    try:
        return _parts(block.node, block, analysis)
    except (InexactError, KeyError):
        return whole


def _parts(node: fx.Node, block: Block, analysis: Analysis) -> list[tuple[str, Term]]:
    """Return the branches that end in ``node``. What follows a sum goes into each of its parts, by linearity."""
    anchor = block.choice.candidate.anchor
    if node is anchor.node:
        return [("identity", Term())]
    step = analysis.steps[node]
    if len(step.inputs) == 1:
        inner = _parts(step.inputs[0], block, analysis)
        # The name of the whole chain, where it is one.
        name = _chain(node, anchor.node, analysis) if len(inner) == 1 else ""
        return [(name or label, step.combine((part,), anchor)) for label, part in inner]
    if len(step.inputs) == 2 and node.target in _SIGNS and _alpha(node) is not None:
        left, right = (_parts(source, block, analysis) for source in step.inputs)
        factor = _SIGNS[node.target] * (_alpha(node) or 0.0)
        return left + [(label, scale_term(part, factor, 0.0, None, anchor)) for label, part in right]
    if len(step.inputs) > 1 and all(source is anchor.node for source in step.inputs):
        return [("identity", step.combine(tuple(Term() for _ in step.inputs), anchor))]
    return [(_chain(node, anchor.node, analysis), _whole(node, block, analysis))]


def _chain(node: fx.Node, anchor: fx.Node, analysis: Analysis) -> str:
    return " + ".join(listed(branches_of(node, anchor, analysis.steps)))


def _whole(node: fx.Node, block: Block, analysis: Analysis) -> Term:
    anchor = block.choice.candidate.anchor
    if node is anchor.node:
        return Term()
    step = analysis.steps[node]
    return step.combine(tuple(_whole(source, block, analysis) for source in step.inputs), anchor)


def _alpha(node: fx.Node) -> float | None:
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return float(alpha) if isinstance(alpha, (int, float)) else None


def _facts(label: str, part: Term, geometry: Geometry, block: Block, pairs: tuple[tuple[int, int], ...]) -> KernelFacts:
    axis = block.choice.candidate.term.axis
    assert axis is not None
    lifted = lift(part, axis, block.choice.candidate.anchor)
    assert lifted.geometry is not None
    extent = tuple(one.kernel for one in lifted.geometry.axes)
    return _kernel_facts(label, _on_taps(lifted, geometry, block), extent, pairs)


def _on_taps(term: Term, geometry: Geometry, block: Block) -> Tensor:
    """Return the kernel of ``term`` written on the channels, groups and taps of the block's own."""
    assert term.recipe is not None
    kernel = compute(term.recipe)
    kernel = reading(kernel, geometry)
    if not geometry.transposed:
        kernel = embed(kernel, geometry.axes)
    if tuple(kernel.weight.shape) != geometry.weight_shape:
        raise InexactError(f"block {block.name}: a branch of another shape than the block")
    return kernel.weight


def _pairs(weight: Tensor, geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """Return the (output, input) channels to show: the largest weight, the largest of a channel onto itself, (0, 1)."""
    strength = weight.abs().flatten(2).amax(2) if weight.ndim > 2 else weight.abs()
    outputs, inputs = strength.shape
    found = [divmod(int(strength.argmax()), inputs)]
    per_group = geometry.out_channels // geometry.groups
    own = [(o, o - (o // per_group) * inputs) for o in range(outputs)]
    own = [(o, i) for o, i in own if 0 <= i < inputs]
    if own:
        found.append(max(own, key=lambda pair: float(strength[pair])))
    if inputs > 1:
        found.append((0, 1))
    return tuple(dict.fromkeys((o, i) for o, i in found))


def _kernel_facts(
    label: str, weight: Tensor, extent: tuple[int, ...], pairs: tuple[tuple[int, int], ...]
) -> KernelFacts:
    taps = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
    rms = taps.square().mean((0, 1)).sqrt()
    return KernelFacts(
        label,
        extent,
        tuple(_digits(value) for value in rms.tolist()),
        tuple(tuple(_digits(value) for value in taps[pair].tolist()) for pair in pairs),
    )


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
