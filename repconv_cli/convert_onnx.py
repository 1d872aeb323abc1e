"""The use cases on ONNX files: read → translate → plan → prove → rewrite → run both → write."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repconv_cli import __version__
from repconv_cli.checkpoint import check_output
from repconv_cli.clock import Clock, Progress, counting
from repconv_cli.drawing import with_drawing
from repconv_cli.errors import InputError, NotRunnableError, OutputError, RepconvError
from repconv_cli.facts import block_facts, input_facts, refusal_facts, totals
from repconv_cli.graph.certificate import Certificate
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.plan import Block, Plan, make_plan
from repconv_cli.onnx.blocks import is_worth
from repconv_cli.onnx.counts import count_operators, count_parameters
from repconv_cli.onnx.reading import OnnxFile, is_onnx, read_onnx
from repconv_cli.onnx.rewrite import planned_nodes, rewrite
from repconv_cli.onnx.runs import Comparison
from repconv_cli.onnx.shapes import Inference, infer
from repconv_cli.onnx.translate import Translated, translate
from repconv_cli.onnx.writing import set_metadata, write_onnx
from repconv_cli.options import Options
from repconv_cli.results import BlockFacts, Change, OutputFacts, Result, SourceFacts, Totals, Verification
from repconv_cli.verdict import Outputs, judge, proof_inputs, random_inputs

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OnnxSource", "fuse", "inspect", "is_onnx", "open_onnx", "verify"]

_UNUSED = {"arch": "--arch", "state_key": "--state-key"}


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file, read and translated."""

    file: OnnxFile
    inference: Inference
    translated: Translated

    def block_facts(self, block: Block, certificate: Certificate | None = None) -> BlockFacts:
        """Return what is told of a block; its sources are those that the file names."""
        facts = block_facts(block, certificate)
        return replace(facts, sources=tuple(key for key in facts.sources if key in self.translated.values))

    def is_worth(self, block: Block) -> bool:
        """Whether a block is a gain in ONNX."""
        return is_worth(self.translated, block)

    @property
    def facts(self) -> SourceFacts:
        """What is told of the source."""
        program, file = self.translated.program, self.file
        dtype = str(program.dtype()).removeprefix("torch.")
        notes = (f"opset {file.opset}, {len(file.model.graph.node)} nodes",)
        return SourceFacts(
            str(file.path), "onnx", file.sha256, file.size_bytes, dtype, len(file.initializers()), False, notes
        )


def open_onnx(path: str | Path, options: Options) -> OnnxSource:
    """Return the ONNX file at ``path``, read and translated.

    Raises :class:`InputError` for what is none, or an option that it has no use for.
    """
    for name, option in _UNUSED.items():
        if getattr(options, name) is not None:
            raise InputError(f"it is an ONNX model, so {option} is not needed", where=str(path))
    file = read_onnx(path)
    try:
        inference = infer(file, options.input)
        return OnnxSource(file, inference, translate(file, inference))
    except RepconvError as error:
        error.at(str(path))
        raise


def inspect(source: str | Path, options: Options, clock: Clock) -> Result:
    """Return what can be fused in an ONNX file, what cannot and why."""
    with clock.phase("Reading"):
        opened = open_onnx(source, options)
    with clock.phase("Analysing"):
        plan = make_plan(opened.translated.program, options.blocks, is_worth=opened.is_worth)
    result = Result(
        "inspect",
        opened.facts,
        input_facts(opened.translated.program, opened.inference.is_guessed),
        tuple(opened.block_facts(block) for block in plan.blocks),
        tuple(refusal_facts(plan)),
        _totals(opened, plan),
        notes=_notes(opened),
        seconds=clock.seconds,
    )
    return with_drawing(result, plan, clock.report) if options.draw else result


def _totals(opened: OnnxSource, plan: Plan, model: ModelProto | None = None) -> Totals:
    graph = opened.file.model.graph
    nodes = planned_nodes(opened.translated, plan) if model is None else list(model.graph.node)
    before, after = count_operators(graph.node, graph), count_operators(nodes, graph)
    planned = totals(plan)
    changes = {name: Change(before[name], after[name]) for name in before}
    parameters = planned.params
    if model is not None:
        parameters = Change(count_parameters(opened.file.model), count_parameters(model))
    return Totals(**changes, params=parameters, macs=planned.macs)


def _notes(opened: OnnxSource) -> tuple[str, ...]:
    return opened.translated.program.notes


def fuse(source: str | Path, out: str | Path, options: Options, *, force: bool, dry_run: bool, clock: Clock) -> Result:
    """Fuse every block of an ONNX file, prove it, run both models, and write ``out``, an ONNX file as well."""
    if Path(out).suffix != ".onnx":
        raise OutputError("an ONNX model is written as ONNX", where=str(out), needed="a name that ends in .onnx")
    check_output(out, force=force, source=source)
    with clock.phase("Reading"):
        opened = open_onnx(source, options)
    with clock.phase("Fusing"):
        fused, missing = _fuse(opened, options, clock.report)
        model = rewrite(opened.translated, fused.fusions, fused.program.tensors)
    with clock.phase("Verifying"):
        verification = _compare(opened, replace(opened.file, model=model), options, clock.report, missing)
    result = Result(
        "fuse",
        opened.facts,
        input_facts(opened.translated.program, opened.inference.is_guessed),
        tuple(opened.block_facts(b, c) for b, c in zip(fused.plan.blocks, fused.certificates, strict=True)),
        tuple(refusal_facts(fused.plan)),
        _totals(opened, fused.plan, model),
        verification,
        notes=_notes(opened),
        seconds=clock.seconds,
    )
    if options.draw:
        result = with_drawing(result, fused.plan, clock.report)
    if result.exit_code(options.strict):
        return result
    with clock.phase("Writing"):
        _add_metadata(model, opened, fused, verification)
        written = write_onnx(out, model, opened.file, force=force, dry_run=dry_run)
    return replace(result, output=OutputFacts(str(out), written.size_bytes, written.sha256, dry_run))


def _fuse(opened: OnnxSource, options: Options, progress: Progress | None) -> tuple[Fused, str | None]:
    """Return the fused program, every block proved, and why the whole was not proved in float64 (None if it was)."""
    program = opened.translated.program

    def run(inputs: list[tuple[Tensor, ...]]) -> Fused:
        return fuse_program(
            program,
            inputs,
            only=options.blocks,
            seed=options.seed,
            progress=progress,
            is_worth=opened.is_worth,
        )

    reason = ""
    # Sizes that are declared free need not be taken by all of the graph: then those that it was measured at.
    for inputs in (proof_inputs(program, options.seed), random_inputs(program, 1, options.seed)):
        try:
            return run(list(inputs)), None
        except NotRunnableError as error:
            reason = error.found
    return run([]), f"the whole model in float64 before its weights are cast ({reason}); every block was"


def _compare(
    opened: OnnxSource, fused: OnnxFile, options: Options, progress: Progress, missing: str | None = None
) -> Verification:
    """Return the verdict on ``fused``, both models run by onnxruntime."""
    not_checked = [] if missing is None else [missing]
    try:
        shapes = tuple(info.example for info in opened.translated.program.inputs)
        comparison = Comparison(opened.translated, translate(fused, infer(fused, shapes)))
    except InputError as error:
        if opened.inference.why_not_run is None:
            raise
        reason = f"the outputs ({error.found}); every block was proved by itself"
        return Verification("partial", True, *(None,) * 8, not_checked=(*not_checked, reason))
    inputs = random_inputs(opened.translated.program, options.samples, options.seed)
    inputs = counting("Comparing outputs", inputs, options.samples, progress)
    runs = (Outputs(r.expected, r.found, r.exact, r.exact_fused) for r in comparison.runs(inputs))
    with torch.no_grad():
        verdict = judge(runs, options.limits)
    not_checked += comparison.not_checked
    choices = sorted({node.op_type for node in comparison.choices})
    assumptions = (f"both models are given the original's choices ({', '.join(choices)})",) if choices else ()
    found = replace(verdict, not_checked=(*verdict.not_checked, *not_checked), assumptions=assumptions)
    if not comparison.has_exact:
        found = replace(found, float64=None)
    return found


def _add_metadata(model: ModelProto, opened: OnnxSource, fused: Fused, verification: Verification) -> None:
    """Note the version and the figures; no time and no path, so that equal input gives equal bytes."""
    figures = {
        "verdict": verification.verdict,
        "max_abs": verification.max_abs,
        "noise": verification.noise,
        "ratio": verification.ratio,
        "worst_certificate": max((c.error for c in fused.certificates), default=0.0),
        "blocks": len(fused.fusions),
    }
    source = {"name": opened.file.path.name, "sha256": opened.file.sha256}
    entries = {"version": __version__, "source": json.dumps(source), "verification": json.dumps(figures)}
    set_metadata(model, {f"repconv.{name}": text for name, text in entries.items()})


def verify(source: str | Path, out: str | Path, options: Options, clock: Clock) -> Result:
    """Judge the ONNX file at ``out`` against the one at ``source``: outputs, and tensors against a new plan."""
    with clock.phase("Reading"):
        opened = open_onnx(source, options)
        written = read_onnx(out)
        _require_same_call(opened, written, str(out))
    with clock.phase("Comparing outputs"):
        try:
            verification = _compare(opened, written, options, clock.report)
        except RepconvError as error:
            error.at(str(out))
            raise
    with clock.phase("Redoing the plan"):
        fused = fuse_program(opened.translated.program, [], seed=options.seed, is_worth=opened.is_worth)
        verification = _check_tensors(verification, opened, written, fused)
    result = Result(
        "verify",
        opened.facts,
        input_facts(opened.translated.program, opened.inference.is_guessed),
        verification=verification,
        output=OutputFacts(str(out), written.size_bytes, written.sha256, False),
        notes=_notes(opened),
        seconds=clock.seconds,
    )
    return with_drawing(result, fused.plan, clock.report) if options.draw else result


def _require_same_call(opened: OnnxSource, written: OnnxFile, out: str) -> None:
    def call(file: OnnxFile) -> tuple[list[str], list[str]]:
        constants = file.initializers()
        inputs = [value.name for value in file.model.graph.input if value.name not in constants]
        return inputs, [value.name for value in file.model.graph.output]

    mine, theirs = call(opened.file), call(written)
    if mine != theirs:
        raise InputError(f"its inputs and outputs are {theirs}, the source's {mine}"[:400], where=out)


def _check_tensors(verification: Verification, opened: OnnxSource, written: OnnxFile, fused: Fused) -> Verification:
    """Compare every constant of the file with what a new plan gives; name the first that is off."""
    expected = rewrite(opened.translated, fused.fusions, fused.program.tensors)
    mine = {tensor.name: tensor for tensor in expected.graph.initializer}
    theirs = written.initializers()
    if mine.keys() != theirs.keys():
        reason = "the file's constants are not those of a new plan, so they were judged by the outputs alone"
        return replace(verification, not_checked=(*verification.not_checked, reason))
    for name, proto in mine.items():
        a, b = opened.file.tensor(proto), written.tensor(theirs[name])
        if a is not None and not _agree(a, b):
            looks = f"{name} is not what a new plan gives"
            return replace(verification, verdict="fail", passed=False, first_bad_block=name, looks_like=looks)
    return replace(verification, tensors_checked=len(mine))


def _agree(expected: Tensor, found: Tensor | None) -> bool:
    if found is None or expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    a, b = expected.double(), found.double()
    scale = a.abs().amax(tuple(range(1, a.ndim)), keepdim=True) if a.ndim > 1 else a.abs()
    difference = (a - b).abs() <= 4 * torch.finfo(expected.dtype).eps * scale
    return bool((difference | (a == b) | (a.isnan() & b.isnan())).all())
