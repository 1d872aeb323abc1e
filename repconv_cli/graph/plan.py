"""The plan: blocks to fuse and refusals with their reasons, as data. ``inspect`` prints it, ``fuse`` executes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

from torch import fx

from repconv_cli.errors import InputError
from repconv_cli.graph.analyse import Analysis, Cost, analyse, is_convolution, is_norm
from repconv_cli.graph.kind import branches_of, kind_of, listed
from repconv_cli.graph.lift import Lifted, find_lifted
from repconv_cli.graph.program import Program, is_computation, unused_path
from repconv_cli.graph.refusals import Refusal, find_refusals
from repconv_cli.graph.select import Choice, select
from repconv_cli.graph.spread import spread_norms
from repconv_cli.graph.written import is_written_as_linear, takeable_geometry, written_tensors


@dataclass(frozen=True)
class Block:
    """A multi-branch unit, or a convolution and its norm, that becomes one operator on its anchor.

    ``target`` is the module path of the new tensors, ``tensors`` their shapes by key: none where the node is its
    anchor's own value. ``weight_shape`` is the kernel's, however it is written. ``sources`` are the tensor keys that go
    into it. Counts are of this block alone, for one sample.
    """

    name: str
    kind: str
    branches: tuple[str, ...]
    choice: Choice
    sources: tuple[str, ...]
    target: str
    tensors: Mapping[str, tuple[int, ...]]
    weight_shape: tuple[int, ...]
    before: Cost
    after: Cost
    params_before: int
    params_after: int
    convs_before: int
    convs_after: int
    norms_before: int

    @property
    def node(self) -> fx.Node:
        """The node whose value the block gives."""
        return self.choice.node

    @property
    def anchor(self) -> fx.Node:
        """The node that the block reads."""
        return self.choice.candidate.anchor.node

    @property
    def freed(self) -> tuple[fx.Node, ...]:
        """The nodes that are no longer computed."""
        return self.choice.freed


@dataclass(frozen=True)
class Plan:
    """What will be fused, what will not and why, and which constants are stored instead of computed.

    ``program`` is the graph that the blocks are of, ``source`` the one that was given: norms may be spread over parts.
    """

    program: Program
    analysis: Analysis
    blocks: tuple[Block, ...]
    refusals: tuple[Refusal, ...]
    source: Program
    lifted: tuple[Lifted, ...] = ()

    def removed(self) -> set[fx.Node]:
        """Return the nodes that the blocks replace."""
        return {node for block in self.blocks for node in (block.node, *block.freed)}


def make_plan(
    program: Program,
    only: str | None = None,
    unproven: Mapping[tuple[str, str], str] | None = None,
    is_worth: Callable[[Block], bool] | None = None,
) -> Plan:
    """Return the plan for ``program``; ``only`` keeps the blocks whose name matches a glob.

    ``unproven`` are the names of nodes and anchors that failed their proof, with what it found: they are refused.
    ``is_worth`` tells of a block whether it is a gain where it is written down, if that is not here; others are left.
    """
    whole: set[str] = set()
    while True:
        # Where others write the plan down, node by node, the graph stays as it is.
        spread, parts = spread_norms(program, whole) if is_worth is None else (program, {})
        plan = replace(_plan(spread, only, unproven or {}, list(parts.values()), is_worth), source=program)
        folded = {node.name for node in plan.removed()}
        left = {norm for norm, names in parts.items() if not folded.issuperset(names)}
        if not left:
            return plan
        # A norm that is not folded into every part stays the one that it was.
        whole |= left


def _plan(
    program: Program,
    only: str | None,
    unproven: Mapping[tuple[str, str], str],
    together: list[tuple[str, ...]],
    is_worth: Callable[[Block], bool] | None,
) -> Plan:
    """Return the plan for a graph in which each of ``together`` are the parts of one norm: taken all or none."""
    analysis = analyse(program)
    nodes = {node.name: node for node in program.graph.nodes}
    for (node, anchor), reason in unproven.items():
        if node in nodes and anchor in nodes:
            analysis.refuse(nodes[node], nodes[anchor], reason)
    choices = select(program, analysis)
    naming = _Naming(program, analysis)
    blocks = [naming.block(choice) for choice in choices]
    if is_worth is not None:
        blocks = [block for block in blocks if is_worth(block)]
    if only is not None:
        names = [block.name for block in blocks]
        blocks = _matching(blocks, only, together)
        if names and not blocks:
            raise InputError(f"--blocks {only!r} matches no block", needed=f"names such as {', '.join(names[:3])}")
    refusals = find_refusals(program, analysis, [block.choice for block in blocks])
    plan = Plan(program, analysis, tuple(blocks), tuple(refusals), program)
    if only is not None:
        return plan
    return replace(plan, lifted=find_lifted(program, analysis.constants, plan.removed(), naming.taken))


def _matching(blocks: list[Block], only: str, together: list[tuple[str, ...]]) -> list[Block]:
    """Return the blocks whose name matches, and with each that takes a part of a norm those that take the others."""
    inside = {block.name: {node.name for node in (block.node, *block.freed)} for block in blocks}
    wanted = {name for name in inside if fnmatchcase(name, only)}
    for parts in together:
        takers = {name for name, nodes in inside.items() if not nodes.isdisjoint(parts)}
        wanted |= takers if takers & wanted else set()
    return [block for block in blocks if block.name in wanted]


class _Naming:
    """Gives blocks their names, and fused tensors their keys."""

    def __init__(self, program: Program, analysis: Analysis) -> None:
        self.program = program
        self.analysis = analysis
        # A key that more than one operator reads, or that the model gives out, keeps its meaning: it is never reused
        # for a fused weight.
        self.uses = Counter(
            key
            for node in program.graph.nodes
            if node.op in ("call_function", "output") and node not in analysis.constants
            for source in node.all_input_nodes
            if source in analysis.constants
            for key in analysis.constants.keys(source)
        )
        self.taken: set[str] = set(program.tensors)
        self.names: Counter[str] = Counter()

    def block(self, choice: Choice) -> Block:
        removed = (choice.node, *choice.freed)
        sources = self._sources(removed)
        anchor = choice.candidate.anchor
        tensors = written_tensors(choice.candidate.term, anchor)
        shape = weight_shape(choice) if tensors else ()
        target = self._target(choice, sources, tensors) if tensors else ""
        branches = branches_of(choice.node, anchor.node, self.analysis.steps)
        return Block(
            name=self._name(branches.total() > 1, sources, target, choice),
            kind="identity" if not shape else kind_of(branches),
            branches=listed(branches),
            choice=choice,
            sources=tuple(sources),
            target=target,
            tensors={f"{target}.{name}": tensor for name, tensor in tensors.items()},
            weight_shape=shape,
            before=choice.before.per_sample(self.program.samples()),
            after=choice.candidate.cost.per_sample(self.program.samples()),
            params_before=self._parameters(sources),
            params_after=sum(map(prod, tensors.values())),
            convs_before=sum(is_convolution(node) for node in removed),
            convs_after=int(_is_written_as_convolution(choice)),
            norms_before=sum(is_norm(node) for node in removed),
        )

    def _sources(self, nodes: tuple[fx.Node, ...]) -> list[str]:
        found: dict[str, None] = {}
        for node in sorted(nodes):
            for source in node.all_input_nodes:
                if source in self.analysis.constants:
                    found.update(dict.fromkeys(self.analysis.constants.keys(source)))
        return list(found)

    def _parameters(self, sources: list[str]) -> int:
        return sum(self.program.tensors[key].numel() for key in sources if key in self.program.parameters)

    def _target(self, choice: Choice, sources: list[str], tensors: Mapping[str, tuple[int, ...]]) -> str:
        """Return the module path of the branch whose kernel has the fused shape, else a new one under the block."""
        is_convolution_weight = choice.candidate.term.convolutions > 0
        for key in sources:
            path, _, leaf = key.rpartition(".")
            if (
                is_convolution_weight
                and leaf == "weight"
                and tuple(self.program.tensors[key].shape) == tensors["weight"]
                and self.uses[key] == 1
                and self._is_free(f"{path}.bias" if path else "bias", sources)
            ):
                return path
        prefix = _common_path(sources) or str(choice.node.meta.get("module", ""))
        target = unused_path(f"{prefix}.fused" if prefix else "fused", self.taken)
        self.taken.add(f"{target}.weight")
        return target

    def _is_free(self, key: str, sources: list[str]) -> bool:
        return key not in self.program.tensors or (key in sources and self.uses[key] <= 1)

    def _name(self, is_sum: bool, sources: list[str], target: str, choice: Choice) -> str:
        path = _common_path(sources)
        own = target.rpartition(".")[0] if target.endswith(".fused") else target
        name = path if is_sum and path else own or path or str(choice.node.meta.get("module", ""))
        name = name or choice.node.name
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"


def _common_path(keys: list[str]) -> str:
    """Return the longest module path that all ``keys`` share."""
    shared: list[str] = []
    for parts in zip(*(key.split(".")[:-1] for key in keys), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def weight_shape(choice: Choice) -> tuple[int, ...]:
    """Return the shape of the new weight, ``()`` where the block needs none."""
    term, anchor = choice.candidate.term, choice.candidate.anchor
    if term.geometry is None:
        return ()
    shape = takeable_geometry(term, anchor).weight_shape
    return shape[:2] if is_written_as_linear(term, anchor) else shape


def _is_written_as_convolution(choice: Choice) -> bool:
    """Whether the new operator is a convolution, not a linear layer, a scale or nothing."""
    term = choice.candidate.term
    return term.convolutions > 0 and not is_written_as_linear(term, choice.candidate.anchor)


def count_ops(program: Program) -> dict[str, int]:
    """Return the number of convolutions, batch norms and operations in a graph."""
    calls = [node for node in program.graph.nodes if is_computation(node)]
    return {
        "convs": sum(is_convolution(node) for node in calls),
        "norms": sum(is_norm(node) for node in calls),
        "ops": len(calls),
    }
