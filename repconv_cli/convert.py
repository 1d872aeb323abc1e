"""The use cases: read → trace → plan → rewrite → certify → verify → write, and ``load``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from repconv_cli import convert_onnx
from repconv_cli.alone import fuse_alone, verify_alone
from repconv_cli.checkpoint import check_output, read
from repconv_cli.clock import Clock, Progress, counting
from repconv_cli.contents import inspect_contents
from repconv_cli.convert_onnx import is_onnx
from repconv_cli.deploy import fuse_deploy, inspect_deploy, verify_deploy
from repconv_cli.drawing import with_drawing
from repconv_cli.errors import InputError, RepconvError
from repconv_cli.facts import block_facts, input_facts, plan_notes, refusal_facts, totals
from repconv_cli.full import check_tensors, compare_outputs, fuse_full, fuse_traced, require_same_call, unchecked
from repconv_cli.graph.interpret import running
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.made import Made
from repconv_cli.onnx.session import Session
from repconv_cli.opening import Opened, WeightsAlone, open_source, program_in, trace_source
from repconv_cli.options import Options
from repconv_cli.outputs import RuntimeModel, as_output, check_format, read_onnx_output
from repconv_cli.results import OutputFacts, Result
from repconv_cli.verdict import compare, random_inputs


def inspect(source: str | Path | nn.Module, options: Options | None = None, progress: Progress | None = None) -> Result:
    """Return what can be fused in ``source``, what cannot and why: the plan alone, with no kernel computed.

    Of weights without an architecture, return what they hold.
    """
    options, clock = options or Options(), Clock(progress)
    if not isinstance(source, nn.Module) and is_onnx(source):
        return convert_onnx.inspect(source, options, clock)
    contents = None if isinstance(source, nn.Module) else inspect_contents(source, options)
    if contents is not None:
        return contents
    with clock.phase("Reading"):
        opened = open_source(source, options)
    assert isinstance(opened, Opened)
    program, is_guessed = _traced(opened, options, clock)
    if options.target == "deploy":
        return inspect_deploy(opened, program, is_guessed, options, clock)
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
        return convert_onnx.fuse(path, out, options, force=force, dry_run=dry_run, clock=clock)
    check_output(out, force=force, source=path if path is not None and path.exists() else None)
    check_format(out)
    with clock.phase("Reading"):
        opened = open_source(source, options)
    if (isinstance(opened, WeightsAlone) or options.target == "deploy") and Path(out).suffix in (".onnx", ".pt2"):
        raise InputError(
            f"a deploy form is tensors by name, and {Path(out).suffix} is a graph",
            where=opened.facts.name,
            needed="a .safetensors",
        )
    try:
        if isinstance(opened, WeightsAlone):
            return fuse_alone(opened, out, options, clock, force=force, dry_run=dry_run)
        made = _made(opened, out, options, clock)
    except RepconvError as error:
        error.at(opened.facts.name)
        raise
    if made.result.exit_code(options.strict):
        return made.result
    with clock.phase("Writing"):
        written = made.output.write(out, made.metadata, force=force, source=path, dry_run=dry_run)
    output = OutputFacts(str(out), written.size_bytes, written.sha256, dry_run)
    return replace(made.result, output=output, seconds=clock.seconds)


def _made(opened: Opened, out: str | Path, options: Options, clock: Clock) -> Made:
    program, is_guessed = _traced(opened, options, clock)
    if options.target == "deploy":
        return fuse_deploy(opened, program, is_guessed, options, clock)
    return fuse_full(opened, program, is_guessed, options, clock, out)


def _traced(opened: Opened, options: Options, clock: Clock) -> tuple[Program, bool]:
    """Return the graph of ``opened``, and whether its input was guessed."""
    if options.eps is not None:
        raise InputError("--eps is for weights alone: in a graph each norm has its own", hint="Leave --eps out.")
    with clock.phase("Tracing"):
        return trace_source(opened, options)


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
        error.at(str(path))
        raise


def verify(
    source: str | Path | nn.Module,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Result:
    """Judge the file that lies at ``out`` against ``source``: outputs, and each fused tensor against a new plan."""
    options, clock = options or Options(), Clock(progress)
    if not isinstance(source, nn.Module) and is_onnx(source):
        return (convert_onnx.verify if is_onnx(out) else _verified_from_onnx)(source, out, options, clock)
    with clock.phase("Reading"):
        opened = open_source(source, options)
        # How an ONNX file is called is told by the source.
        written = None if is_onnx(out) else open_source(out, replace(options, arch=None, state_key=None))
    try:
        if written is not None and written.metadata.get("repconv.target") == "deploy":
            return _verified_deploy(opened, written, options, clock)
        if isinstance(opened, WeightsAlone):
            raise InputError("it holds no graph to compare outputs with", hint="Give the architecture with --arch.")
        return _verified_full(opened, written, out, options, clock)
    except RepconvError as error:
        error.at(opened.facts.name)
        raise


def _verified_deploy(
    opened: Opened | WeightsAlone, written: Opened | WeightsAlone, options: Options, clock: Clock
) -> Result:
    if isinstance(opened, WeightsAlone):
        result = verify_alone(opened, written, options, clock)
    else:
        program, is_guessed = _traced(opened, options, clock)
        result = verify_deploy(opened, program, is_guessed, written, options, clock)
    facts = written.facts
    output = OutputFacts(facts.name, facts.size_bytes or 0, facts.sha256 or "", False)
    return replace(result, output=output, seconds=clock.seconds)


def _verified_from_onnx(source: str | Path, out: str | Path, options: Options, clock: Clock) -> Result:
    """Judge a file that torch runs against an ONNX model that onnxruntime runs."""
    with clock.phase("Reading"):
        opened = convert_onnx.open_onnx(source, options)
        file = as_output(open_source(out, options))
        program = opened.translated.program
        require_same_call(program, file.program, str(out))
    inputs = random_inputs(program, options.samples, options.seed)
    inputs = counting("Comparing outputs", inputs, options.samples, clock.report)
    with clock.phase("Comparing outputs"), running(f"the graph in {out}"):
        model = RuntimeModel(Session(opened.file.model, opened.file.folder), program)
        verification = compare(program, model, file.program, file.model, inputs, options.limits)
    return Result(
        "verify",
        opened.facts,
        input_facts(program, opened.inference.is_guessed),
        verification=unchecked(verification, "the source is of another format, which names its tensors in its own way"),
        output=OutputFacts(str(out), file.size_bytes, file.sha256, False),
        notes=program.notes,
        seconds=clock.seconds,
    )


def _verified_full(
    opened: Opened, written: Opened | WeightsAlone | None, out: str | Path, options: Options, clock: Clock
) -> Result:
    program, is_guessed = _traced(opened, options, clock)
    with clock.phase("Reading the output"):
        file = read_onnx_output(out, program) if written is None else as_output(written)
        require_same_call(program, file.program, str(out), is_run=not file.has_foreign_names)
    with clock.phase("Comparing outputs"), running(f"the graph in {out}"):
        verification = compare_outputs(program, opened.module, file.program, file.model, options, clock.report)
    with clock.phase("Redoing the plan"):
        fused = fuse_traced(program, replace(options, blocks=None), None)
        verification = check_tensors(verification, program, fused, file, options)
    result = Result(
        "verify",
        opened.facts,
        input_facts(program, is_guessed),
        verification=verification,
        output=OutputFacts(str(out), file.size_bytes, file.sha256, False),
        notes=program.notes,
        seconds=clock.seconds,
    )
    return with_drawing(result, fused.plan, clock.report) if options.draw else result
