"""The use case of ``repconv bench``: what fusing gains, measured."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from repconv_cli.clock import Clock, Progress
from repconv_cli.errors import InputError
from repconv_cli.facts import input_facts, totals
from repconv_cli.full import compare_outputs, fuse_traced, require_same_call
from repconv_cli.graph.interpret import running
from repconv_cli.graph.kept import in_eval_mode
from repconv_cli.graph.program import InputInfo, Program, ProgramModule
from repconv_cli.opening import Opened, WeightsAlone, open_source, trace_source
from repconv_cli.options import Options, Timing
from repconv_cli.results import BenchFacts, OutputFacts, Result, Totals
from repconv_cli.timing import measure_runtime
from repconv_cli.timing.runtimes import choose
from repconv_cli.verdict import random_inputs


def bench(
    source: str | Path | nn.Module,
    out: str | Path | None = None,
    options: Options | None = None,
    timing: Timing | None = None,
    progress: Progress | None = None,
) -> Result:
    """Return how much faster the fused model is, in each runtime: the file at ``out``, or ``source`` fused in memory.

    Outputs are compared first, on one sample: the speed of a wrong model is no gain.
    """
    options, timing, clock = options or Options(), timing or Timing(), Clock(progress)
    runtimes = choose(timing.runtimes)
    with clock.phase("Reading"):
        opened = _with_graph(open_source(source, options))
        written = None if out is None else _with_graph(open_source(out, replace(options, arch=None, state_key=None)))
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Fusing"):
        fused, counts = _fused(program, written, str(out), options)
    model = ProgramModule(fused).eval()
    # A graph from a file may fail in any way; one that was made here may not.
    with clock.phase("Comparing outputs"), nullcontext() if out is None else running(f"the graph in {out}"):
        verification = compare_outputs(program, opened.module, fused, model, replace(options, samples=1))
    timed = replace(program, inputs=tuple(_resized(info, timing.batch) for info in program.inputs))
    leaves = iter(next(random_inputs(timed, 1, options.seed)))
    call = program.arguments.unflatten(leaves), program.keywords.unflatten(leaves)
    measured = []
    for index, name in enumerate(runtimes):
        with clock.phase(f"Timing {name}"):
            clock.report(f"Timing {name}", index, len(runtimes))
            pair = (opened.module, model)
            with in_eval_mode(opened.module):
                measured.append(measure_runtime(name, *pair, call, threads=timing.threads, seconds=timing.seconds))
    facts = BenchFacts(tuple(info.example for info in timed.inputs), timing.threads, _processor(), tuple(measured))
    output = None if written is None else _output(written)
    return Result(
        "bench", opened.facts, input_facts(program, is_guessed), totals=counts, verification=verification,
        output=output, bench=facts, notes=program.notes, seconds=clock.seconds,
    )  # fmt: skip


def _with_graph(opened: Opened | WeightsAlone) -> Opened:
    if isinstance(opened, WeightsAlone):
        raise InputError(
            "it holds no graph, so it cannot be run", where=opened.facts.name, hint="Give the architecture with --arch."
        )
    return opened


def _fused(program: Program, written: Opened | None, out: str, options: Options) -> tuple[Program, Totals | None]:
    if written is None:
        fused = fuse_traced(program, options, None)
        return fused.program, totals(fused.plan)
    if written.program is None or not written.is_fused:
        raise InputError("it holds no graph, so it cannot be run", where=out, needed="a file that fuse wrote")
    require_same_call(program, written.program, out)
    return written.program, None


def _resized(info: InputInfo, batch: int | None) -> InputInfo:
    """Return ``info`` with ``batch`` samples; without a wish one, or as many as it is fixed to."""
    if not info.shape or info.shape[0] is not None:
        if batch is not None and info.shape and batch != info.shape[0]:
            raise InputError(f"--batch {batch} for input {info.name}", needed=f"{info.shape[0]}: its batch is fixed")
        return info
    return replace(info, example=(batch or 1, *info.example[1:]))


def _output(written: Opened) -> OutputFacts:
    return OutputFacts(written.facts.name, written.facts.size_bytes or 0, written.facts.sha256 or "", False)


def _processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
