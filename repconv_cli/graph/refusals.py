"""What looked like a candidate and was not taken, each with its reason."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from repconv_cli.graph.analyse import Analysis, Candidate, cost_of_node, is_convolution, is_norm
from repconv_cli.graph.program import Program
from repconv_cli.graph.rules import aten
from repconv_cli.graph.select import Choice

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
# Only that the axes of a value change places is not worth a word where nothing else could be fused.
_MOVES = {aten.reshape.default, aten.permute.default, aten.transpose.int, aten.squeeze.dims, aten.unsqueeze.default}
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
    return not analysis.candidates.get(node, {}).keys() - set(step.inputs) and _has_linear_branch(node, analysis)


def _feeds_sum_of_layers(node: fx.Node, analysis: Analysis) -> bool:
    return any(reader.target in _SUMS and _has_linear_branch(reader, analysis) for reader in node.users)


def _has_linear_branch(node: fx.Node, analysis: Analysis) -> bool:
    return any(
        c.term.convolutions for source in node.all_input_nodes for c in analysis.candidates.get(source, {}).values()
    )


def _cost_reason(node: fx.Node, composed: list[Candidate], analysis: Analysis) -> str:
    dearer = _times_the_work(node, composed, analysis)
    return dearer or "exact as one convolution, but its inner values are also read elsewhere, so nothing would be saved"


def _times_the_work(node: fx.Node, composed: list[Candidate], analysis: Analysis) -> str | None:
    """Return by how much even the cheapest of ``composed`` is dearer than what it replaces, None if it is not."""
    nearest = min(composed, key=lambda c: c.cost.macs)
    region = _between(node, nearest.anchor.node, analysis)
    now = sum(cost_of_node(n, analysis.steps).macs for n in region)
    then = nearest.cost.macs
    if not now or then <= now:
        return None
    counts = f"{now // analysis.samples:,} → {then // analysis.samples:,} MACs"
    return f"exact as one convolution, but {then / now:.3g} times the work ({counts})"


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
    readers = len(source.users) if isinstance(source, fx.Node) else 0
    before = _spoken(source) if isinstance(source, fx.Node) else "the input"
    if readers > 1:
        return f"a norm after {before}, whose value is also read elsewhere: folding would compute it twice"
    return f"a norm after {before}, with no convolution to fold into"


def _sum_reason(node: fx.Node, analysis: Analysis) -> str:
    """Say what stands between the branches of a sum and a common source."""
    barriers = dict.fromkeys(_spoken(end) for source in node.all_input_nodes for end in _ends(source, analysis))
    return f"the branches have no common linear source: {', '.join(barriers) or 'two inputs'} between"


def _ends(node: fx.Node, analysis: Analysis) -> list[fx.Node]:
    """Return where the linear operators before ``node`` begin."""
    seen: set[fx.Node] = set()
    ends: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        step = analysis.steps.get(current)
        if step is None:
            ends[current] = None
        else:
            stack.extend(step.inputs)
    return list(ends)


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
        if keys:
            return keys[0].rpartition(".")[0]
    return str(node.meta.get("module") or node.name)
