"""Choose what to compute as one operator: fewest multiply-accumulates first, then fewest passes over the values."""

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
        self.readers = {node: set(node.users) for node in program.graph.nodes}
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        self.choices: dict[fx.Node, Choice] = {}

    def is_needed(self, node: fx.Node) -> bool:
        """Whether some computed node, or the caller, reads ``node``."""
        return bool(self.readers[node])

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
            if source is not anchor and removed[source] == len(self.readers[source]) and source.op == "call_function":
                freed.append(source)
                stack.extend(self.sources_of(source))
        return freed

    def gain(self, node: fx.Node, candidate: Candidate) -> Gain | None:
        """Return (multiply-accumulates saved, passes saved) by ``candidate``, None where that is no gain."""
        before = sum((self.costs[n] for n in self.freed_by(node, candidate.anchor.node)), self.costs[node])
        saved = before - candidate.cost
        return (saved.macs, saved.passes) if saved.is_gain() else None

    def take(self, node: fx.Node, candidate: Candidate) -> None:
        """Make ``node`` read its anchor alone; what was chosen for it, or for what it frees, goes into the choice."""
        freed = self.freed_by(node, candidate.anchor.node)
        for reader in (node, *freed):
            for source in self.sources_of(reader):
                self.readers[source].discard(reader)
        earlier = [self.choices.pop(n) for n in (node, *freed) if n in self.choices]
        replaced = {choice.node for choice in earlier}
        before = sum((self.costs[n] for n in (node, *freed) if n not in replaced), Cost())
        before = sum((choice.before for choice in earlier), before)
        all_freed = (*freed, *(n for choice in earlier for n in choice.freed))
        self.choices[node] = Choice(node, candidate, all_freed, before)
        self.sources[node] = [candidate.anchor.node]
        self.readers[candidate.anchor.node].add(node)
        self.costs[node] = candidate.cost


def select(program: Program, analysis: Analysis) -> list[Choice]:
    """Return the choices, from the inputs to the outputs.

    Outputs first: a node that is needed takes the candidate with the largest gain, counting what its anchor could
    gain in turn; what only it needed is then no longer computed, and is not considered again.
    """
    ledger = Ledger(program, analysis)
    reachable = _reachable_gains(program, ledger)
    for node in reversed(program.graph.nodes):
        if not ledger.is_needed(node):
            continue
        # Taking nothing leaves the gains of what the node reads.
        best: Candidate | None = None
        nothing = max((reachable.get(source, (0, 0)) for source in node.all_input_nodes), default=(0, 0))
        # Of equal totals, the one with most of it in this block: fewer blocks.
        best_gain = (nothing, (0, 0))
        for anchor, candidate in analysis.candidates.get(node, {}).items():
            gain = ledger.gain(node, candidate)
            if gain is None:
                continue
            total = _plus(gain, reachable.get(anchor, (0, 0)))
            if total > nothing and (total, gain) > best_gain:
                best, best_gain = candidate, (total, gain)
        if best is not None:
            ledger.take(node, best)
        _spread(node, ledger)
    return [ledger.choices[node] for node in program.graph.nodes if node in ledger.choices]


def _spread(node: fx.Node, ledger: Ledger) -> None:
    """Take ``node`` into each of its readers, where that saves its computation: a norm that two convolutions read."""
    readers = sorted(ledger.readers[node])
    if node.op != "call_function" or len(readers) < 2:
        return
    found: list[tuple[fx.Node, Candidate]] = []
    for reader in readers:
        candidates = ledger.analysis.candidates.get(reader, {}).items()
        beyond = [c for anchor, c in candidates if anchor is not node and anchor < node and ledger.is_needed(anchor)]
        if not beyond:
            return
        found.append((reader, min(beyond, key=lambda c: (c.cost.macs, c.cost.passes))))
    saved = sum((ledger.costs[reader] - candidate.cost for reader, candidate in found), ledger.costs[node])
    if saved.is_gain():
        for reader, candidate in found:
            ledger.take(reader, candidate)


def _reachable_gains(program: Program, ledger: Ledger) -> dict[fx.Node, Gain]:
    """Return the largest gain along one path of anchors up to each node."""
    gains: dict[fx.Node, Gain] = {}
    for node in program.graph.nodes:
        candidates = ledger.analysis.candidates.get(node)
        if candidates is None:
            continue
        best = max((gains.get(source, (0, 0)) for source in node.all_input_nodes), default=(0, 0))
        for anchor, candidate in candidates.items():
            gain = ledger.gain(node, candidate)
            if gain is not None:
                best = max(best, _plus(gain, gains.get(anchor, (0, 0))))
        gains[node] = best
    return gains


def _plus(left: Gain, right: Gain) -> Gain:
    return left[0] + right[0], left[1] + right[1]
