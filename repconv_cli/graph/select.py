"""Choose what to compute as one operator: fewest multiply-accumulates first, then fewest operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import fx

from repconv_cli.graph.analyse import Analysis, Candidate, Cost, cost_of_node
from repconv_cli.graph.program import Program

Gain = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """A node that becomes one operator on its candidate's anchor, and the nodes that nobody needs after that."""

    node: fx.Node
    candidate: Candidate
    freed: tuple[fx.Node, ...]
    before: Cost


class Ledger:
    """Who reads whom in the graph as chosen so far: a node without readers is not computed."""

    def __init__(self, program: Program, analysis: Analysis) -> None:
        self.analysis = analysis
        self.costs = {node: cost_of_node(node, analysis.steps) for node in program.graph.nodes}
        self.readers: Counter[fx.Node] = Counter()
        for node in program.graph.nodes:
            self.readers.update(node.all_input_nodes)
        self.sources: dict[fx.Node, list[fx.Node]] = {}

    def is_needed(self, node: fx.Node) -> bool:
        """Whether some computed node, or the caller, reads ``node``."""
        return self.readers[node] > 0

    def sources_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that ``node`` reads as chosen so far."""
        return self.sources.get(node, node.all_input_nodes)

    def freed_by(self, node: fx.Node, anchor: fx.Node) -> list[fx.Node]:
        """Return the nodes that lose their last reader when ``node`` reads ``anchor`` alone."""
        removed: Counter[fx.Node] = Counter()
        freed: list[fx.Node] = []
        stack = list(self.sources_of(node))
        while stack:
            source = stack.pop()
            removed[source] += 1
            if source is not anchor and removed[source] == self.readers[source] and source.op == "call_function":
                freed.append(source)
                stack.extend(self.sources_of(source))
        return freed

    def gain(self, node: fx.Node, candidate: Candidate) -> tuple[Gain, list[fx.Node]]:
        """Return (multiply-accumulates saved, operations saved) by ``candidate``, and the freed nodes."""
        freed = self.freed_by(node, candidate.anchor.node)
        before = sum((self.costs[n] for n in freed), self.costs[node])
        saved = before - candidate.cost
        return (saved.macs, saved.ops), freed

    def take(self, node: fx.Node, candidate: Candidate) -> Choice:
        """Make ``node`` read its anchor alone; return what that was."""
        _, freed = self.gain(node, candidate)
        before = sum((self.costs[n] for n in freed), self.costs[node])
        for reader in (node, *freed):
            self.readers.subtract(self.sources_of(reader))
        self.sources[node] = [candidate.anchor.node]
        self.readers[candidate.anchor.node] += 1
        self.costs[node] = candidate.cost
        return Choice(node, candidate, tuple(freed), before)


def is_gain(gain: Gain) -> bool:
    """No more multiply-accumulates than before, and fewer operations."""
    return gain[0] >= 0 and gain[1] > 0


def select(program: Program, analysis: Analysis) -> list[Choice]:
    """Return the choices, from the inputs to the outputs.

    Outputs first: a node that is needed takes the candidate with the largest gain, counting what its anchor could
    gain in turn; what only it needed is then no longer computed, and is not considered again.
    """
    ledger = Ledger(program, analysis)
    reachable = _reachable_gains(program, ledger)
    choices: list[Choice] = []
    for node in reversed(program.graph.nodes):
        if not ledger.is_needed(node):
            continue
        # Taking nothing leaves the gains of what the node reads.
        best: Candidate | None = None
        best_gain = max((reachable.get(source, (0, 0)) for source in node.all_input_nodes), default=(0, 0))
        for anchor, candidate in analysis.candidates.get(node, {}).items():
            gain, _ = ledger.gain(node, candidate)
            total = _plus(gain, reachable.get(anchor, (0, 0)))
            if is_gain(gain) and total > best_gain:
                best, best_gain = candidate, total
        if best is not None:
            choices.append(ledger.take(node, best))
    return choices[::-1]


def _reachable_gains(program: Program, ledger: Ledger) -> dict[fx.Node, Gain]:
    """Return the largest gain along one path of anchors up to each node."""
    gains: dict[fx.Node, Gain] = {}
    for node in program.graph.nodes:
        candidates = ledger.analysis.candidates.get(node)
        if candidates is None:
            continue
        best = max((gains.get(source, (0, 0)) for source in node.all_input_nodes), default=(0, 0))
        for anchor, candidate in candidates.items():
            gain, _ = ledger.gain(node, candidate)
            if is_gain(gain):
                best = max(best, _plus(gain, gains.get(anchor, (0, 0))))
        gains[node] = best
    return gains


def _plus(left: Gain, right: Gain) -> Gain:
    return left[0] + right[0], left[1] + right[1]
