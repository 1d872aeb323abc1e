"""Blocks that the caller gives, found again in a graph: each with its tensors, made elsewhere, and proven here.

A given block is known by the keys of its tensors. Where in the graph it is follows from the data flow: from an anchor
to a node between which exactly those keys are read, and where one operator with the given tensors computes the same.
The last is not looked for by shape or name but proven, so a wrong place cannot be taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from repconv_cli.errors import InexactError, UnprovenError
from repconv_cli.graph.analyse import Analysis, Candidate, Cost, analyse, cost_of_node, is_convolution, is_norm
from repconv_cli.graph.certificate import certify
from repconv_cli.graph.constants import region_between
from repconv_cli.graph.kind import branches_of, kind_of, listed
from repconv_cli.graph.plan import Block, Plan, weight_shape
from repconv_cli.graph.program import Program
from repconv_cli.graph.refusals import Refusal
from repconv_cli.graph.replay import without_norms
from repconv_cli.graph.rewrite import Fusion, fuse_block
from repconv_cli.graph.select import Choice, Ledger
from repconv_cli.graph.term import Anchor, Term

# A block is small: what lies further from its layer than this many operators is another's.
_FURTHEST = 64


@dataclass(frozen=True)
class GivenBlock:
    """A block by its keys: ``layer`` is that of one of its weights. ``tensors`` are the new ones, float64, by key."""

    name: str
    target: str
    sources: frozenset[str]
    layer: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Placed:
    """Where given blocks are in a graph. ``missing`` are blocks whose layer the graph reads nowhere."""

    plan: Plan
    fusions: tuple[Fusion, ...]
    missing: tuple[str, ...] = ()


def place_blocks(program: Program, given: Sequence[GivenBlock], stored: frozenset[str], seed: int = 0) -> Placed:
    """Return a plan of exactly the ``given`` blocks; ``stored`` are all keys of the checkpoint.

    A block that is nowhere what its tensors say becomes a refusal with the reason.
    """
    placer = _Placer(program, stored, seed)
    fusions: list[Fusion] = []
    refusals: list[Refusal] = []
    missing: list[str] = []
    for block in given:
        uses = placer.uses(block)
        if not uses:
            missing.append(block.name)
        for number, use in enumerate(uses):
            named = block if not number else replace(block, name=f"{block.name}#{number + 1}")
            try:
                fusions.append(placer.place(named, use))
            except UnprovenError as error:
                refusals.append(Refusal(block.name, use.name, error.found))
    fusions.sort(key=lambda fusion: fusion.block.node)
    plan = Plan(program, placer.analysis, tuple(fusion.block for fusion in fusions), tuple(refusals), program)
    return Placed(plan, tuple(fusions), tuple(missing))


@dataclass
class _Placer:
    program: Program
    stored: frozenset[str]
    seed: int
    analysis: Analysis = field(init=False)
    ledger: Ledger = field(init=False)
    reads: dict[fx.Node, frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.analysis = analyse(self.program)
        self.ledger = Ledger(self.program, self.analysis)
        constants = self.analysis.constants
        self.reads = {
            node: frozenset(
                key for source in node.all_input_nodes if source in constants for key in constants.keys(source)
            )
            & self.stored
            for node in self.program.graph.nodes
            if node.op == "call_function" and node not in constants
        }

    def uses(self, block: GivenBlock) -> list[fx.Node]:
        """Return the operators that read the block's layer: one for each time that it is called."""
        return [node for node, keys in self.reads.items() if block.layer in keys]

    def place(self, block: GivenBlock, use: fx.Node) -> Fusion:
        """Return ``block`` at ``use``, proven. Raises :class:`UnprovenError` with the nearest reason."""
        reason = "its tensors are read in no linear part of the graph by themselves"
        for node, candidate in self._candidates(block, use):
            fusion = self._fusion(block, node, candidate)
            if fusion is None:
                continue
            try:
                self._prove(fusion)
            except UnprovenError as error:
                reason = error.found
                continue
            return fusion
        replayed = self._replayed(block, use)
        if replayed is not None:
            self._prove(replayed)
            return replayed
        raise UnprovenError(reason)

    def _prove(self, fusion: Fusion) -> None:
        constants = self.analysis.constants
        certify(fusion, constants, self.seed)
        constants.forget()

    def _candidates(self, block: GivenBlock, use: fx.Node) -> Iterator[tuple[fx.Node, Candidate]]:
        """Yield nodes from ``use`` on, with the anchors between which the block's keys are read and no others."""
        for node in self._downstream(use):
            for anchor, candidate in self.analysis.candidates.get(node, {}).items():
                keys = self._keys_between(anchor, node)
                if keys == block.sources:
                    yield node, candidate
                if not keys <= block.sources:
                    # A farther anchor only adds to what is read.
                    break

    def _downstream(self, use: fx.Node) -> list[fx.Node]:
        found, stack = {use}, [use]
        while stack and len(found) < _FURTHEST:
            for user in stack.pop().users:
                # A node between may be no operator of its own, such as a sum whose border is not made up for yet.
                if user not in found and user in self.analysis.steps:
                    found.add(user)
                    stack.append(user)
        return sorted(found)

    def _keys_between(self, anchor: fx.Node, node: fx.Node) -> frozenset[str]:
        region = region_between(anchor, node, self.analysis.constants)
        return frozenset(key for n in region for key in self.reads.get(n, ()))

    def _fusion(self, block: GivenBlock, node: fx.Node, candidate: Candidate) -> Fusion | None:
        """Return ``block`` at a node; None where the shapes differ."""
        choice = self._choice(node, candidate)
        try:
            shape = weight_shape(choice)
            planned = self._block(block, choice, shape)
            fusion = fuse_block(planned)
        except (InexactError, UnprovenError):
            return None
        if len(fusion.keys) != len(block.tensors):
            return None
        tensors = tuple(block.tensors[key] for key in fusion.keys)
        return replace(fusion, compute=lambda: tensors)

    def _choice(self, node: fx.Node, candidate: Candidate) -> Choice:
        freed = tuple(self.ledger.freed_by(node, candidate.anchor.node))
        before = sum((self.ledger.costs[n] for n in freed), self.ledger.costs[node])
        return Choice(node, candidate, freed, before)

    def _block(self, block: GivenBlock, choice: Choice, shape: tuple[int, ...], kind: str = "") -> Block:
        removed = (choice.node, *choice.freed)
        samples = self.program.samples()
        anchor = choice.candidate.anchor.node
        branches = Counter({kind: 1}) if kind else branches_of(choice.node, anchor, self.analysis.steps)
        parameters = self.program.parameters
        return Block(
            name=block.name,
            kind=kind or kind_of(branches),
            branches=listed(branches),
            choice=choice,
            sources=tuple(sorted(block.sources)),
            target=block.target,
            tensors={key: tuple(tensor.shape) for key, tensor in block.tensors.items()},
            weight_shape=shape,
            before=choice.before.per_sample(samples),
            after=choice.candidate.cost.per_sample(samples),
            params_before=sum(self.program.tensors[k].numel() for k in block.sources if k in parameters),
            params_after=sum(tensor.numel() for tensor in block.tensors.values()),
            convs_before=sum(is_convolution(n) for n in removed),
            convs_after=int(len(shape) > 2),
            norms_before=sum(is_norm(n) for n in removed),
        )

    def _replayed(self, block: GivenBlock, use: fx.Node) -> Fusion | None:
        """Return the block with all its operators but the norms, where it is no part of one; None if it is not so."""
        readers = [node for node, keys in self.reads.items() if keys and keys <= block.sources]
        norms = {node for node in readers if is_norm(node) and node < use}
        if not norms or len(block.tensors) != 2:
            return None
        anchor = min(norms).args[0]
        assert isinstance(anchor, fx.Node)
        region = region_between(anchor, use, self.analysis.constants)
        norms &= set(region)
        reading = {node for node in region if self.reads.get(node)}
        if self._keys_between(anchor, use) != block.sources or reading != {use, *norms}:
            return None
        keys = (f"{block.target}.weight", f"{block.target}.bias")
        emit = without_norms(region, anchor, norms, keys)
        if emit is None:
            return None
        before = sum((cost_of_node(n, self.analysis.steps) for n in region), Cost())
        saved = sum((cost_of_node(n, self.analysis.steps) for n in norms), Cost())
        choice = Choice(use, Candidate(Anchor.of(anchor), Term(), before - saved), (), before)
        tensors = tuple(block.tensors[key] for key in keys)
        planned = self._block(block, choice, tuple(tensors[0].shape), kind="norm before a layer")
        return Fusion(planned, emit, keys, lambda: tensors)
