"""From plans and certificates to plain results."""

from __future__ import annotations

from collections.abc import Iterator

from repconv_cli.graph.analyse import cost_of_node
from repconv_cli.graph.certificate import Certificate
from repconv_cli.graph.plan import Block, Plan, count_ops
from repconv_cli.graph.program import Program
from repconv_cli.graph.select import Choice
from repconv_cli.results import BlockFacts, Change, InputFacts, RefusalFacts, Totals


def block_facts(block: Block, certificate: Certificate | None = None) -> BlockFacts:
    """Return what is told of one block."""
    proof = None if certificate is None else {"error": certificate.error, "limit": certificate.limit}
    return BlockFacts(
        name=block.name,
        kind=block.kind,
        branches=block.branches,
        sources=block.sources,
        target=f"{block.target}.weight" if block.target else None,
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


def totals(plan: Plan, fused: Program | None = None) -> Totals:
    """Return the counts of the whole model, from the fused graph where there is one, else from the plan."""
    before, after = _counts(plan.program), _planned(plan) if fused is None else _counts(fused)
    samples = plan.program.samples()
    macs = sum(cost_of_node(node, plan.analysis.steps).macs for node in plan.program.graph.nodes) // samples
    saved = sum(_saved(block.choice) for block in plan.blocks) // samples
    changes = {name: Change(before[name], after[name]) for name in ("convs", "norms", "ops", "params")}
    return Totals(**changes, macs=Change(macs, macs - saved))


def _saved(choice: Choice) -> int:
    return choice.before.macs - choice.candidate.cost.macs


def _counts(program: Program) -> dict[str, int]:
    parameters = sum(program.tensors[key].numel() for key in program.parameters if key in program.tensors)
    return {**count_ops(program), "params": parameters}


def _planned(plan: Plan) -> dict[str, int]:
    counts = _counts(plan.program)
    for block in plan.blocks:
        counts["convs"] += block.convs_after - block.convs_before
        counts["norms"] -= block.norms_before
        counts["ops"] += block.after.ops - block.before.ops
    counts["params"] += sum(block.params_after for block in plan.blocks) - _released(plan)
    return counts


def _released(plan: Plan) -> int:
    """Return the parameters that nothing reads once the blocks are fused."""
    removed = {node for block in plan.blocks for node in (block.node, *block.freed)}
    constants = plan.analysis.constants
    kept = {
        key
        for node in plan.program.graph.nodes
        if node not in removed and node not in constants
        for source in node.all_input_nodes
        if source in constants
        for key in constants.keys(source)
    }
    released = {key for block in plan.blocks for key in block.sources} - kept
    return sum(plan.program.tensors[key].numel() for key in released & plan.program.parameters)
