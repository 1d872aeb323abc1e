"""Everything that can be fused in a graph: planned, proven, compared; and a file of it judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from repconv_cli.allocation import suit_model
from repconv_cli.clock import Clock, Progress, counting
from repconv_cli.diagnosis import first_block_off, first_difference, largest_error, looks_like
from repconv_cli.drawing import with_drawing
from repconv_cli.errors import InputError
from repconv_cli.facts import block_facts, input_facts, plan_notes, refusal_facts, totals
from repconv_cli.graph.allowance import require_like
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.kept import in_eval_mode
from repconv_cli.graph.program import Program
from repconv_cli.graph.serial import to_json
from repconv_cli.made import Made, metadata
from repconv_cli.opening import Opened, own_example
from repconv_cli.options import Options
from repconv_cli.outputs import Written, make_output
from repconv_cli.results import Result, Verification
from repconv_cli.verdict import Model, compare, proof_inputs, random_inputs

_ANOTHER = "Was it made of another model?"


def fuse_full(
    opened: Opened, program: Program, is_guessed: bool, options: Options, clock: Clock, out: str | Path
) -> Made:
    """Return the model with every block fused, in the format that ``out`` asks for, and the verdict on its outputs."""
    with clock.phase("Fusing"):
        fused = fuse_traced(program, options, clock.report)
    with clock.phase("Verifying"):
        made = make_output(out, fused.program)
        verification = compare_outputs(program, opened.module, made.program, made.model, options, clock.report)
    result = _result(opened, program, is_guessed, fused, verification, clock)
    if options.draw:
        result = with_drawing(result, fused.plan, clock.report)
    key_map = {key: fusion.block.sources for fusion in fused.fusions for key in fusion.keys}
    key_map |= {lifted.key: lifted.sources for lifted in fused.plan.lifted}
    described = metadata(opened.facts, key_map, verification, figures(fused))
    return Made(result, made, described)


def figures(fused: Fused) -> dict[str, float]:
    """Return the figures of the proof for the file's metadata."""
    return {
        "float64_whole_model": fused.float64_error,
        "worst_certificate": max((c.error for c in fused.certificates), default=0.0),
        "blocks": len(fused.fusions),
    }


def _result(
    opened: Opened, program: Program, is_guessed: bool, fused: Fused, verification: Verification, clock: Clock
) -> Result:
    used = {key for block in fused.plan.blocks for key in block.sources}
    used |= {key for lifted in fused.plan.lifted for key in lifted.sources}
    left_out = sorted(set(program.tensors) - set(fused.program.tensors) - used)
    unread = [key for key in left_out if not key.endswith("num_batches_tracked")]
    notes = plan_notes(fused.plan)
    if unread:
        notes.append(f"{len(unread)} tensors that no output depends on were left out, such as {unread[0]}")
    return Result(
        "fuse",
        opened.facts,
        input_facts(program, is_guessed),
        tuple(block_facts(b, proof) for b, proof in zip(fused.plan.blocks, fused.certificates, strict=True)),
        tuple(refusal_facts(fused.plan)),
        totals(fused.plan),
        verification,
        notes=tuple(notes),
        seconds=clock.seconds,
    )


def fuse_traced(program: Program, options: Options, progress: Progress | None) -> Fused:
    """Return ``program`` fused and proven, as the options ask."""
    suit_model(sum(tensor.nbytes for tensor in program.tensors.values()))
    return fuse_program(
        program,
        proof_inputs(program, options.seed),
        dtype=program.dtype(),
        only=options.blocks,
        seed=options.seed,
        progress=progress,
    )


def compare_outputs(
    original: Program,
    module: nn.Module,
    fused: Program,
    fused_module: Model,
    options: Options,
    progress: Progress | None = None,
) -> Verification:
    """Return the verdict on the user's inputs, else on random ones; ``module`` is in eval mode for it."""
    own = own_example(module, options)
    inputs = random_inputs(original, options.samples, options.seed)
    inputs = counting("Comparing outputs", inputs, options.samples, progress)
    if own is not None and own.values is not None:
        inputs = iter([own.values])
    with in_eval_mode(module):
        return compare(original, module, fused, fused_module, inputs, options.limits)


def require_same_call(program: Program, stored: Program, out: str, *, is_run: bool = True) -> None:
    """Raise :class:`InputError` unless the file at ``out`` takes ``program``'s inputs, and about as much memory.

    ``is_run`` says whether torch runs its graph, or another runtime does.
    """
    mine = [(len(i.shape), i.dtype) for i in program.inputs]
    theirs = [(len(i.shape), i.dtype) for i in stored.inputs]
    if mine != theirs:
        raise InputError(f"its inputs are {_told(stored)}, the source's {_told(program)}", where=out, hint=_ANOTHER)
    for info, fixed in zip(program.inputs, stored.inputs, strict=True):
        if any(size is not None and size != own for size, own in zip(fixed.shape, info.example, strict=True)):
            given = "×".join(map(str, info.example))
            raise InputError(
                f"its input is {_told(stored)}, and it is compared on {given}",
                where=out,
                hint=f"{_ANOTHER} If not, give a shape that both take with --input.",
            )
    try:
        if is_run:
            require_like(program, stored)
    except InputError as error:
        error.at(out)
        raise


def _told(program: Program) -> str:
    """Return the shapes and dtypes of the inputs; a question mark stands for a size that is free."""
    sizes = ("×".join("?" if size is None else str(size) for size in info.shape) for info in program.inputs)
    dtypes = (str(info.dtype).removeprefix("torch.") for info in program.inputs)
    return ", ".join(f"{shape} of {dtype}" for shape, dtype in zip(sizes, dtypes, strict=True))


def unchecked(verification: Verification, reason: str) -> Verification:
    """Return a verdict that rests on the outputs alone, and so is partial at best."""
    verdict = "partial" if verification.passed else verification.verdict
    reasons = (*verification.not_checked, f"{reason}, so it was judged by the outputs alone")
    return replace(verification, verdict=verdict, not_checked=reasons)


def check_tensors(
    verification: Verification, program: Program, fused: Fused, written: Written, options: Options
) -> Verification:
    """Compare every tensor in the file with what a new plan gives; name the first block that is off."""
    final, stored = fused.program, written.program
    verification = replace(verification, not_checked=(*verification.not_checked, *written.not_checked))
    shared = {key for key, tensor in final.tensors.items() if key in written.tensors}
    if written.has_foreign_names:
        # An exporter stores what it computed from the others under names, and in shapes, of its own.
        shared = {key for key in shared if final.tensors[key].shape == written.tensors[key].shape}
        final, stored = (
            replace(final, tensors={k: t[k] for k in sorted(shared)}) for t in (final.tensors, written.tensors)
        )
    elif set(final.tensors) != set(stored.tensors):
        return unchecked(verification, "the file's tensors are not those of a new plan")
    difference = first_difference(fused, final, stored)
    if difference is None:
        found = replace(verification, tensors_checked=len(shared))
        if written.has_planned_graph and to_json(final) != to_json(stored):
            found = unchecked(found, "the file's graph is not that of a new plan")
        if found.passed or written.has_foreign_names:
            return found
        block = first_block_off(fused, final, stored, next(random_inputs(program, 1, options.seed)))
        looks = found.looks_like
        if block is not None:
            looks = f"{block} has the right weights, and is not computed as it should be"
        return replace(found, first_bad_block=block, looks_like=looks)
    return replace(
        verification,
        verdict="fail",
        passed=False,
        tensors_checked=len(shared),
        first_bad_block=difference.block,
        looks_like=looks_like(difference),
        largest_error=largest_error(difference),
    )
