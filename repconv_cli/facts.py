"""From plans and certificates to plain results."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from repconv_cli.graph.analyse import cost_of_node
from repconv_cli.graph.certificate import Certificate
from repconv_cli.graph.lift import no_longer_computed
from repconv_cli.graph.plan import Block, Plan, count_ops
from repconv_cli.graph.program import Program
from repconv_cli.graph.rewrite import Fusion, fuse_block, rewrite
from repconv_cli.results import BlockFacts, Change, InputFacts, RefusalFacts, Totals


def block_facts(block: Block, certificate: Certificate | None = None) -> BlockFacts:
    """Return what is told of one block."""
    proof = None if certificate is None else {"error": certificate.error, "limit": certificate.limit}
    return BlockFacts(
        name=block.name,
        kind=block.kind,
        branches=block.branches,
        sources=block.sources,
        target=next(iter(block.tensors), None),
        weight_shape=block.weight_shape,
        ops=Change(block.before.ops, block.after.ops),
        macs=Change(block.before.macs, block.after.macs),
        params=Change(block.params_before, block.params_after),
        certificate=proof,
    )


def refusal_facts(plan: Plan) -> Iterator[RefusalFacts]:
    """Yield what is told of each refusal."""
    for refusal in plan.refusals:
        yield RefusalFacts(refusal.name, refusal.node, refusal.reason)


def input_facts(program: Program, is_guessed: bool) -> InputFacts:
    """Return what is told of the input."""
    return InputFacts(
        tuple(info.shape for info in program.inputs), tuple(info.example for info in program.inputs), is_guessed
    )


def plan_notes(plan: Plan) -> list[str]:
    """Return what is to be said of the trace, and of constants that are stored."""
    notes = list(plan.program.notes)
    if plan.lifted:
        what = "value that no input reaches is" if len(plan.lifted) == 1 else "values that no input reaches are"
        example = plan.lifted[0].key
        notes.append(f"{len(plan.lifted)} {what} stored instead of computed at each call, such as {example}")
    return notes


def totals(plan: Plan, fusions: tuple[Fusion, ...] | None = None) -> Totals:
    """Return the counts of the whole model: of the graph as it is, and as the plan (or ``fusions``) writes it.

    No kernel is computed.
    """
    written = rewrite(plan, tuple(fuse_block(block) for block in plan.blocks) if fusions is None else fusions)
    before, after = count_ops(plan.source), count_ops(written)
    before["params"] = _parameters(plan.program)
    after["params"] = _parameters(written) + sum(block.params_after for block in plan.blocks)
    after["params"] += sum(prod(item.node.meta["shape"]) for item in plan.lifted if item.key in written.parameters)
    changes = {name: Change(before[name], after[name]) for name in ("convs", "norms", "ops", "params")}
    return Totals(**changes, macs=_macs(plan))


def _parameters(program: Program) -> int:
    return sum(program.tensors[key].numel() for key in program.parameters if key in program.tensors)


def _macs(plan: Plan) -> Change:
    """Return the multiply-accumulates of one sample."""
    costs = {node: cost_of_node(node, plan.analysis.steps).macs for node in plan.program.graph.nodes}
    saved = sum(block.choice.before.macs - block.choice.candidate.cost.macs for block in plan.blocks)
    saved += sum(costs[node] for node in no_longer_computed(plan.lifted, plan.removed(), plan.analysis.constants))
    samples = plan.program.samples()
    return Change(sum(costs.values()) // samples, (sum(costs.values()) - saved) // samples)
