"""What looked like a candidate and was not taken, each with its reason."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from repconv_cli.graph.analyse import Analysis, Candidate, Cost, cost_of_node, is_convolution, is_norm
from repconv_cli.graph.probe import linear_sources
from repconv_cli.graph.program import Program
from repconv_cli.graph.rules import aten
from repconv_cli.graph.select import Choice
from repconv_cli.graph.unroll import Unrolled

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
# Only that the axes of a value change places is not worth a word where nothing else could be fused.
_MOVES = {aten.reshape.default, aten.permute.default, aten.transpose.int, aten.squeeze.dims, aten.unsqueeze.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_SCALES = {aten.mul.Tensor, aten.div.Tensor}


@dataclass(frozen=True)
class Refusal:
    """A place that was left as it is: its module path, its node, and why."""

    name: str
    node: str
    reason: str


def find_refusals(program: Program, analysis: Analysis, choices: Iterable[Choice]) -> Iterator[Refusal]:
    """Yield a refusal for each remaining sum of linear branches, norm, or pair of linear layers in a row."""
    chosen = {choice.node: choice for choice in choices}
    freed = {node for choice in chosen.values() for node in choice.freed}
    for node in program.graph.nodes:
        if node.op != "call_function" or node in freed or node in analysis.constants:
            continue
        choice = chosen.get(node)
        reason = _reason(node, analysis) if choice is None else _reason_to_stop(choice, analysis)
        if reason is not None:
            yield Refusal(_place(node, analysis), node.name, reason)


def _reason_to_stop(choice: Choice, analysis: Analysis) -> str | None:
    """Return why a block does not take in the layer before it as well, if that would have been exact."""
    anchor = choice.candidate.anchor.node
    if _is_scale(anchor, analysis) and choice.candidate.term.convolutions and choice.node in analysis.reasons:
        return analysis.reasons[choice.node][0]
    before = max((c.term.kernels for c in analysis.candidates.get(anchor, {}).values()), default=0)
    larger = [c for c in analysis.candidates[choice.node].values() if c.term.kernels > choice.candidate.term.kernels]
    if not before or not larger or not choice.candidate.term.convolutions:
        return None
    return _cost_reason(choice.node, larger, analysis)


def _reason(node: fx.Node, analysis: Analysis) -> str | None:
    """Return why ``node`` was left, or None if it never looked like a candidate."""
    if node in analysis.unproven:
        return f"could not be proven, so it was left: {analysis.unproven[node]}"
    known = analysis.reasons.get(node)
    if known and node.target not in _MOVES and _looks_fusible(node, analysis):
        return known[0]
    is_merge = node in analysis.steps and len(analysis.steps[node].inputs) > 1
    composed = [c for c in analysis.candidates.get(node, {}).values() if c.term.kernels > (0 if is_merge else 1)]
    if composed:
        return _cost_reason(node, composed, analysis)
    if is_norm(node):
        return _norm_reason(node, analysis)
    if node.target in _SUMS and _has_linear_branch(node, analysis):
        return _sum_reason(node, analysis)
    if node.target in _SCALES and _has_linear_branch(node, analysis) and node not in analysis.steps:
        return "the scale depends on the input, so it is no constant map"
    return None


def _looks_fusible(node: fx.Node, analysis: Analysis) -> bool:
    """Whether a rule failed between linear operators, not merely at a far anchor."""
    step = analysis.steps.get(node)
    if step is None:
        reads_or_feeds = _has_linear_branch(node, analysis) or any(is_convolution(reader) for reader in node.users)
        return is_norm(node) or reads_or_feeds or _feeds_sum_of_layers(node, analysis)
    is_stuck = not analysis.candidates.get(node, {}).keys() - set(step.inputs)
    return (is_stuck and (_has_linear_branch(node, analysis) or _reads_padding(node))) or _reads_scale(node, analysis)


def _feeds_sum_of_layers(node: fx.Node, analysis: Analysis) -> bool:
    return any(reader.target in _SUMS and _has_linear_branch(reader, analysis) for reader in node.users)


def _has_linear_branch(node: fx.Node, analysis: Analysis) -> bool:
    return any(_is_or_has_layer(source, analysis) for source in node.all_input_nodes)


def _is_or_has_layer(node: fx.Node, analysis: Analysis) -> bool:
    return any(c.term.convolutions for c in analysis.candidates.get(node, {}).values())


def _reads_scale(node: fx.Node, analysis: Analysis) -> bool:
    """Whether a layer reads a value that is only scaled and shifted, as a model that normalises its input does."""
    return is_convolution(node) and any(_is_scale(source, analysis) for source in node.all_input_nodes)


def _reads_padding(node: fx.Node) -> bool:
    """Whether a layer reads a padded value: one that is padded with zeros is never stuck."""
    return is_convolution(node) and any(source.target in _PADS for source in node.all_input_nodes)


def _is_scale(node: fx.Node, analysis: Analysis) -> bool:
    step = analysis.steps.get(node)
    return step is not None and node.target in _SUMS | _SCALES and len(step.inputs) == 1


def _cost_reason(node: fx.Node, composed: list[Candidate], analysis: Analysis) -> str:
    dearer = _times_the_work(node, composed, analysis) or _times_the_weights(node, composed, analysis)
    return dearer or "exact as one convolution, but its inner values are also read elsewhere, so nothing would be saved"


def _times_the_work(node: fx.Node, composed: list[Candidate], analysis: Analysis) -> str | None:
    """Return by how much even the cheapest of ``composed`` is dearer than what it replaces, None if it is not."""
    nearest = min(composed, key=lambda c: c.cost.macs)
    now, then = _cost_now(node, nearest, analysis).macs, nearest.cost.macs
    if not now or then <= now:
        return None
    counts = f"{now // analysis.samples:,} → {then // analysis.samples:,} MACs"
    layer = "linear layer" if isinstance(nearest.term, Unrolled) else "convolution"
    return f"exact as one {layer}, but {then / now:.3g} times the work ({counts})"


def _times_the_weights(node: fx.Node, composed: list[Candidate], analysis: Analysis) -> str | None:
    """Return how many more weights even the smallest of ``composed`` has, None if it has no more."""
    smallest = min(composed, key=lambda c: c.cost.weights)
    now, then = _cost_now(node, smallest, analysis).weights, smallest.cost.weights
    if not now or then <= now:
        return None
    return f"exact as one convolution, but for the same work with {then / now:.3g} times the weights"


def _cost_now(node: fx.Node, candidate: Candidate, analysis: Analysis) -> Cost:
    """Return what ``candidate`` would replace costs."""
    region = _between(node, candidate.anchor.node, analysis)
    return sum((cost_of_node(n, analysis.steps) for n in region), Cost())


def _between(node: fx.Node, anchor: fx.Node, analysis: Analysis) -> set[fx.Node]:
    """Return the nodes on the way from ``anchor`` to ``node``."""
    region: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is anchor or current in region or current not in analysis.steps:
            continue
        region.add(current)
        stack.extend(analysis.steps[current].inputs)
    return region


def _norm_reason(node: fx.Node, analysis: Analysis) -> str:
    folded = [c for c in analysis.candidates.get(node, {}).values() if c.term.convolutions]
    if folded and (dearer := _times_the_work(node, folded, analysis)) is not None:
        return dearer
    for reader in node.users:
        if analysis.reasons.get(reader):
            return f"cannot be folded into what reads it: {analysis.reasons[reader][0]}"
    source = node.args[0]
    if isinstance(source, fx.Node) and source in analysis.reasons:
        return f"cannot be folded into what it reads: {analysis.reasons[source][0]}"
    before = _spoken(source) if isinstance(source, fx.Node) else "the input"
    if isinstance(source, fx.Node) and len(source.users) > 1 and _is_or_has_layer(source, analysis):
        return f"a norm after {before}, whose value is also read elsewhere: folding would compute it twice"
    return f"a norm after {before}, with no convolution to fold into"


def _sum_reason(node: fx.Node, analysis: Analysis) -> str | None:
    """Say what stands between the branches of a sum and a common source; None for a plain residual connection.

    A shortcut around layers with activations is what its author meant. A layer beside an activation of its own input,
    with or without a layer behind it, beside a layer on its own input's values in other places, or two layers on two
    inputs look like a block.
    """
    ends = _ends(node, analysis)
    if len(ends) < 2:
        return None
    before = _before(ends)
    if not any(_looks_like_block(a, b, ends, before, analysis) for a in ends for b in ends if a is not b):
        return None
    return f"the branches have no common linear source: {', '.join(dict.fromkeys(map(_spoken, ends)))} between"


def _looks_like_block(
    first: fx.Node,
    second: fx.Node,
    ends: dict[fx.Node, bool],
    before: dict[fx.Node, set[fx.Node]],
    analysis: Analysis,
) -> bool:
    if not ends[first]:
        return False
    if first in second.all_input_nodes:
        return True
    if first in before[second]:
        return not ends[second] or linear_sources(second, analysis.constants) is not None
    return second not in before[first]


def _ends(node: fx.Node, analysis: Analysis) -> dict[fx.Node, bool]:
    """Return where the affine operators before ``node`` begin, and whether a layer reads that value."""
    ends: dict[fx.Node, bool] = {}
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(node, False)]
    while stack:
        current, has_layer = stack.pop()
        if (current, has_layer) in seen:
            continue
        seen.add((current, has_layer))
        step = analysis.steps.get(current)
        if step is None:
            ends[current] = ends.get(current, False) or has_layer
            continue
        is_layer = step.leaf is not None and step.leaf.is_layer
        stack.extend((source, has_layer or is_layer) for source in step.inputs)
    return {end: ends[end] for end in sorted(ends)}


def _before(ends: dict[fx.Node, bool]) -> dict[fx.Node, set[fx.Node]]:
    """Return for each of ``ends``, which are in graph order, those of them that it depends on."""
    reached: dict[fx.Node, set[fx.Node]] = {}
    found: dict[fx.Node, set[fx.Node]] = {}
    node = next(iter(ends))
    while len(found) < len(ends):
        reached[node] = set().union(*(reached.get(source, ()) for source in node.all_input_nodes))
        if node in ends:
            found[node] = set(reached[node])
            reached[node].add(node)
        node = node.next
    return found


def _spoken(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input {node.name}"
    if node.target is operator.getitem:
        return "a part of a split"
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else name


def _place(node: fx.Node, analysis: Analysis) -> str:
    """Return the module path of ``node``: its own, or that of the nearest tensor it reads."""
    for source in node.all_input_nodes:
        keys = analysis.constants.keys(source) if source in analysis.constants else []
        if keys and "." in keys[0]:
            return keys[0].rpartition(".")[0]
    return str(node.meta.get("module") or node.name)
