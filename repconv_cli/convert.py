"""The use cases: read → trace → plan → rewrite → certify → verify → write, and ``load``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

from repconv_cli import __version__, convert_onnx
from repconv_cli.checkpoint import check_output, read
from repconv_cli.contents import inspect_contents
from repconv_cli.convert_onnx import is_onnx
from repconv_cli.diagnosis import first_block_off, first_difference, largest_error, looks_like
from repconv_cli.drawing import with_drawing
from repconv_cli.errors import InputError, RepconvError
from repconv_cli.facts import block_facts, input_facts, plan_notes, refusal_facts, totals
from repconv_cli.graph.allowance import require_like
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.interpret import running
from repconv_cli.graph.kept import in_eval_mode
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.serial import to_json
from repconv_cli.opening import FORMAT_VERSION, Opened, open_source, own_example, program_in, trace_source
from repconv_cli.options import Options
from repconv_cli.outputs import Written, check_format, make_output, read_output
from repconv_cli.results import OutputFacts, Result, Verification
from repconv_cli.verdict import Model, compare, proof_inputs, random_inputs

Progress = Callable[[str, int, int], None]


class Clock:
    """Seconds of each phase, and the progress line."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.report: Progress = progress or (lambda phase, done, total: None)

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        """Show ``name``, and count the seconds until the block ends."""
        start = time.perf_counter()
        self.report(name, 0, total)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def inspect(source: str | Path | nn.Module, options: Options | None = None, progress: Progress | None = None) -> Result:
    """Return what can be fused in ``source``, what cannot and why. Nothing is computed but the plan.

    Of weights without an architecture, return what they hold.
    """
    options, clock = options or Options(), Clock(progress)
    if not isinstance(source, nn.Module) and is_onnx(source):
        return convert_onnx.inspect(source, options, clock.report)
    contents = None if isinstance(source, nn.Module) else inspect_contents(source, options)
    if contents is not None:
        return contents
    with clock.phase("Reading"):
        opened = open_source(source, options)
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Analysing"):
        plan = make_plan(program, options.blocks)
    result = Result(
        "inspect",
        opened.facts,
        input_facts(program, is_guessed),
        tuple(block_facts(block) for block in plan.blocks),
        tuple(refusal_facts(plan)),
        totals(plan),
        notes=tuple(plan_notes(plan)),
        seconds=clock.seconds,
    )
    return with_drawing(result, plan, clock.report) if options.draw else result


def fuse(
    source: str | Path | nn.Module,
    out: str | Path,
    options: Options | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fuse every block of ``source``, prove it, and write ``out``; return what was done.

    Nothing exists under ``out`` unless every certificate holds and the verdict on the outputs is no failure; with
    ``strict`` also only if nothing was refused or left unchecked.
    """
    options, clock = options or Options(), Clock(progress)
    path = None if isinstance(source, nn.Module) else Path(source)
    if path is not None and is_onnx(path):
        return convert_onnx.fuse(path, out, options, force=force, dry_run=dry_run, progress=clock.report)
    check_format(out)
    check_output(out, force=force, source=path if path is not None and path.exists() else None)
    with clock.phase("Reading"):
        opened = open_source(source, options)
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Fusing"):
        fused = fuse_traced(program, options, clock.report)
    with clock.phase("Verifying"):
        made = make_output(out, fused.program)
        verification = compare_outputs(program, opened.module, made.program, made.model, options)
    facts = _fuse_result(opened, program, is_guessed, fused, fused.program, verification, clock)
    if options.draw:
        facts = with_drawing(facts, fused.plan, clock.report)
    if facts.exit_code(options.strict):
        return facts
    with clock.phase("Writing"):
        metadata = _metadata(opened, fused, facts)
        written = made.write(out, metadata, force=force, source=path, dry_run=dry_run)
    output = OutputFacts(str(out), written.size_bytes, written.sha256, dry_run)
    return replace(facts, output=output, seconds=clock.seconds)


def _fuse_result(
    opened: Opened,
    program: Program,
    is_guessed: bool,
    fused: Fused,
    final: Program,
    verification: Verification,
    clock: Clock,
) -> Result:
    blocks = tuple(
        block_facts(block, certificate)
        for block, certificate in zip(fused.plan.blocks, fused.certificates, strict=True)
    )
    used = {key for block in fused.plan.blocks for key in block.sources}
    used |= {key for lifted in fused.plan.lifted for key in lifted.sources}
    left_out = sorted(set(program.tensors) - set(final.tensors) - used)
    unread = [key for key in left_out if not key.endswith("num_batches_tracked")]
    notes = plan_notes(fused.plan)
    if unread:
        notes.append(f"{len(unread)} tensors that no output depends on were left out, such as {unread[0]}")
    return Result(
        "fuse",
        opened.facts,
        input_facts(program, is_guessed),
        blocks,
        tuple(refusal_facts(fused.plan)),
        totals(fused.plan),
        verification,
        notes=tuple(notes),
        seconds=clock.seconds,
    )


def fuse_traced(program: Program, options: Options, progress: Progress | None) -> Fused:
    """Return ``program`` fused and proven, as the options ask."""
    return fuse_program(
        program,
        proof_inputs(program, options.seed),
        dtype=program.dtype(),
        only=options.blocks,
        seed=options.seed,
        progress=progress,
    )


def compare_outputs(
    original: Program, module: nn.Module, fused: Program, fused_module: Model, options: Options
) -> Verification:
    """Return the verdict on the user's inputs, else on random ones; ``module`` is in eval mode for it."""
    own = own_example(module, options)
    inputs = random_inputs(original, options.samples, options.seed)
    if own is not None and own.values is not None:
        inputs = iter([own.values])
    with in_eval_mode(module):
        return compare(original, module, fused, fused_module, inputs, options.limits)


def _metadata(opened: Opened, fused: Fused, facts: Result) -> dict[str, str]:
    """Return the file's metadata; no time and no absolute path, so that equal input gives equal bytes."""
    key_map = {key: list(fusion.block.sources) for fusion in fused.fusions for key in fusion.keys}
    key_map |= {lifted.key: list(lifted.sources) for lifted in fused.plan.lifted}
    verification = facts.verification
    assert verification is not None
    figures = {
        "verdict": verification.verdict,
        "max_abs": verification.max_abs,
        "noise": verification.noise,
        "ratio": verification.ratio,
        "float64_whole_model": fused.float64_error,
        "worst_certificate": max((c.error for c in fused.certificates), default=0.0),
        "blocks": len(fused.fusions),
    }
    source = {"name": Path(opened.facts.name).name, "sha256": opened.facts.sha256}
    return {
        "repconv.format": FORMAT_VERSION,
        "repconv.version": __version__,
        "repconv.source": json.dumps(source),
        "repconv.key_map": json.dumps(key_map),
        "repconv.verification": json.dumps(figures),
    }


def load(path: str | Path) -> nn.Module:
    """Return the fused model in ``path``, in eval mode, without the code that made it and without pickle.

    Its ``state_dict`` has the file's keys. Raises :class:`InputError` for a file that holds no graph of ours.
    """
    found = read(path)
    try:
        if found.tensors is None or "repconv.graph" not in found.metadata:
            raise InputError(
                "it holds no graph, so it is not a file that repconv wrote",
                hint="Load its tensors with safetensors instead.",
            )
        return ProgramModule(program_in(found)).eval()
    except RepconvError as error:
        raise error.at(str(path)) from error


def verify(
    source: str | Path | nn.Module,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Result:
    """Judge the file that lies at ``out`` against ``source``: outputs, and each fused tensor against a new plan."""
    options, clock = options or Options(), Clock(progress)
    if not isinstance(source, nn.Module) and is_onnx(source):
        return convert_onnx.verify(source, out, options, clock.report)
    with clock.phase("Reading"):
        opened = open_source(source, options)
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Reading the output"):
        written = read_output(out, program)
        require_same_call(program, written.program, str(out), is_run=not written.has_foreign_names)
    with clock.phase("Comparing outputs"), running(f"the graph in {out}"):
        verification = compare_outputs(program, opened.module, written.program, written.model, options)
    with clock.phase("Redoing the plan"):
        fused = fuse_traced(program, replace(options, blocks=None), None)
        verification = _check_tensors(verification, program, fused, written, options)
    result = Result(
        "verify",
        opened.facts,
        input_facts(program, is_guessed),
        verification=verification,
        output=OutputFacts(str(out), written.size_bytes, written.sha256, False),
        notes=program.notes,
        seconds=clock.seconds,
    )
    return with_drawing(result, fused.plan, clock.report) if options.draw else result


def require_same_call(program: Program, stored: Program, out: str, *, is_run: bool = True) -> None:
    """Raise :class:`InputError` unless the file at ``out`` takes ``program``'s inputs, and about as much memory.

    ``is_run`` says whether torch runs its graph, or another runtime does.
    """
    mine = [(len(i.shape), i.dtype) for i in program.inputs]
    theirs = [(len(i.shape), i.dtype) for i in stored.inputs]
    if mine != theirs:
        raise InputError(
            f"its inputs are {[str(d) for _, d in theirs]}, the source's {[str(d) for _, d in mine]}", where=out
        )
    for info, fixed in zip(program.inputs, stored.inputs, strict=True):
        if any(size is not None and size != own for size, own in zip(fixed.shape, info.example, strict=True)):
            raise InputError(f"its input is fixed to {fixed.shape}, the comparison uses {info.example}", where=out)
    try:
        if is_run:
            require_like(program, stored)
    except InputError as error:
        raise error.at(out) from error


def _unchecked(verification: Verification, reason: str) -> Verification:
    """Return a verdict that rests on the outputs alone, and so is partial at best."""
    verdict = "partial" if verification.passed else verification.verdict
    reasons = (*verification.not_checked, f"{reason}, so it was judged by the outputs alone")
    return replace(verification, verdict=verdict, not_checked=reasons)


def _check_tensors(
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
        return _unchecked(verification, "the file's tensors are not those of a new plan")
    difference = first_difference(fused, final, stored)
    if difference is None:
        found = replace(verification, tensors_checked=len(shared))
        if written.has_planned_graph and to_json(final) != to_json(stored):
            found = _unchecked(found, "the file's graph is not that of a new plan")
        if found.passed or written.has_foreign_names:
            return found
        block = first_block_off(fused, final, stored, next(random_inputs(program, 1, options.seed)))
        looks = None if block is None else f"{block} has the right weights, and is not computed as it should be"
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
