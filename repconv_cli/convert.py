"""The use cases: read → trace → plan → rewrite → certify → verify → write, and ``load``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from repconv_cli import __version__
from repconv_cli.checkpoint import Source, check_output, read, write_safetensors
from repconv_cli.checkpoint.architectures import load_weights, make_architecture
from repconv_cli.checkpoint.values import check_module
from repconv_cli.diagnosis import first_block_off, first_difference, looks_like
from repconv_cli.errors import InputError, RepconvError, TraceError
from repconv_cli.exported import module_of
from repconv_cli.facts import block_facts, input_facts, refusal_facts, totals
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.inputs import Example, guess_shape
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.program import InputInfo, Program, ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.trace import trace
from repconv_cli.results import OutputFacts, Result, SourceFacts, Verification
from repconv_cli.verdict import Limits, compare, proof_inputs, random_inputs

FORMAT_VERSION = "1"
DEFAULT_LIMITS = Limits()
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """What the user may set; the same names as the command line's."""

    arch: str | None = None
    input: tuple[tuple[int, ...], ...] = ()
    samples: int = 4
    seed: int = 0
    limits: Limits = DEFAULT_LIMITS
    state_key: str | None = None
    trust: tuple[str, ...] = ()
    blocks: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class Opened:
    """A source as a module that can be traced, and what is known of it.

    ``program`` is the graph that the source holds, if it holds one (``.pt2``, or a file that ``fuse`` wrote): it
    tells how the model is called.
    """

    module: nn.Module
    facts: SourceFacts
    program: Program | None = None
    is_fused: bool = False


class _Clock:
    """Seconds of each phase, and the progress line."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.report: Progress = progress or (lambda phase, done, total: None)

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        self.report(name, 0, total)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def open_source(source: str | Path | nn.Module, options: Options) -> Opened:
    """Return ``source`` as a module: itself, or what the file holds, or the architecture with the file's weights."""
    if isinstance(source, nn.Module):
        check_module(source)
        notes = (_TRAINING_NOTE.format("given"),) if source.training else ()
        facts = SourceFacts(type(source).__name__, "module", None, None, *_tensor_facts(source), source.training, notes)
        return Opened(source, facts)
    found = read(source, state_key=options.state_key, trust=options.trust)
    try:
        return _open_file(found, options)
    except RepconvError as error:
        raise error.at(str(source)) from error


def _open_file(found: Source, options: Options) -> Opened:
    notes = list(found.notes)
    program: Program | None = None
    if found.kind != "weights" and options.arch is not None:
        raise InputError(f"it holds a whole {found.kind}, so --arch is not needed", hint="Leave --arch out.")
    if found.module is not None:
        module = found.module
    elif found.program is not None:
        holder, program_notes = module_of(found.program)
        module, program = holder, holder.held_program
        notes += program_notes
    elif options.arch is None and "repconv.graph" in found.metadata:
        program = _program_in(found)
        module = ProgramModule(program).eval()
    else:
        module = _architecture(found, options)
    if found.was_training:
        notes.append(_TRAINING_NOTE.format("saved"))
    is_fused = found.program is None and program is not None
    facts = SourceFacts(
        str(found.path),
        "fused" if is_fused else found.kind,
        found.sha256,
        found.size_bytes,
        *_tensor_facts(module),
        found.was_training,
        tuple(notes),
    )
    return Opened(module, facts, program, is_fused)


_TRAINING_NOTE = "the module was {} in training mode; it is used in eval mode"


def _architecture(found: Source, options: Options) -> nn.Module:
    assert found.tensors is not None
    if options.arch is None:
        raise InputError(
            f"it holds {len(found.tensors)} tensors and no graph ({', '.join(list(found.tensors)[:3])}, …)",
            needed="the architecture that they belong to",
            hint="Give it with --arch file.py:callable (or timm:NAME, torchvision:NAME).",
        )
    module = make_architecture(options.arch)
    load_weights(module, found.tensors)
    return module


def _program_in(found: Source) -> Program:
    assert found.tensors is not None
    version = found.metadata.get("repconv.format", "?")
    if version != FORMAT_VERSION:
        raise InputError(f"its format version is {version[:20]!r}", needed=FORMAT_VERSION, hint="Use a newer repconv.")
    program = from_json(found.metadata["repconv.graph"], found.tensors)
    extra = set(found.tensors) - set(program.tensors)
    if extra:
        raise InputError(
            f"it holds {len(extra)} tensors that its graph does not read, such as {sorted(extra)[0][:60]!r}"
        )
    return program


def _tensor_facts(module: nn.Module) -> tuple[str, int]:
    tensors = module.state_dict()
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(counts, key=lambda d: counts[d]) if counts else torch.float32
    return str(dtype).removeprefix("torch."), len(tensors)


def trace_source(opened: Opened, options: Options) -> tuple[Program, bool]:
    """Return the traced program, and whether its input shape was guessed."""
    dtype: torch.dtype = getattr(torch, opened.facts.dtype)
    held = opened.program
    may_vary = None
    if held is not None:
        infos = _resized(held.inputs, options.input)
        example = Example(infos, held.arguments, held.keywords)
        may_vary = tuple(tuple(size is None for size in info.shape) for info in infos)
    else:
        example = Example.positional(options.input or (guess_shape(opened.module, dtype),), dtype)
    args, kwargs = example.tensors()
    try:
        program = trace(opened.module, args, kwargs, may_vary=may_vary)
    except TraceError as error:
        shapes = ", ".join("×".join(map(str, info.example)) for info in example.infos)
        raise error.at(f"{opened.facts.name} with input {shapes}") from error
    return program, held is None and not options.input


def _resized(infos: tuple[InputInfo, ...], shapes: tuple[tuple[int, ...], ...]) -> tuple[InputInfo, ...]:
    """Return a held graph's inputs at the sizes that the user asks for, where they are free."""
    if not shapes:
        return infos
    if len(shapes) != len(infos):
        raise InputError(f"{len(shapes)} shapes given with --input", needed=f"{len(infos)}, one for each input")
    resized = []
    for info, shape in zip(infos, shapes, strict=True):
        fits = len(shape) == len(info.shape) and all(
            s is None or s == n for s, n in zip(info.shape, shape, strict=True)
        )
        if not fits:
            free = ",".join("free" if size is None else str(size) for size in info.shape)
            raise InputError(f"--input {','.join(map(str, shape))} for input {info.name}", needed=f"sizes {free}")
        grown = tuple(max(n, 2) if s is None else n for s, n in zip(info.shape, shape, strict=True))
        resized.append(replace(info, example=grown))
    return tuple(resized)


def inspect(source: str | Path | nn.Module, options: Options | None = None, progress: Progress | None = None) -> Result:
    """Return what can be fused in ``source``, what cannot and why. Nothing is computed but the plan."""
    options, clock = options or Options(), _Clock(progress)
    with clock.phase("Reading"):
        opened = open_source(source, options)
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Analysing"):
        plan = make_plan(program, options.blocks)
    return Result(
        "inspect",
        opened.facts,
        input_facts(program, is_guessed),
        tuple(block_facts(block) for block in plan.blocks),
        tuple(refusal_facts(plan)),
        totals(plan),
        notes=program.notes,
        seconds=clock.seconds,
    )


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
    options, clock = options or Options(), _Clock(progress)
    path = None if isinstance(source, nn.Module) else Path(source)
    check_output(out, force=force, source=path if path is not None and path.exists() else None)
    with clock.phase("Reading"):
        opened = open_source(source, options)
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
    with clock.phase("Fusing"):
        fused = _fuse(program, options, clock.report)
    with clock.phase("Verifying"):
        final = fused.program
        graph = to_json(final)
        stored = from_json(graph, final.tensors)
        verification = _compare(program, opened.module, stored, ProgramModule(stored), options)
    facts = _fuse_result(opened, program, is_guessed, fused, final, verification, clock)
    if exit_code(facts, options.strict):
        return facts
    with clock.phase("Writing"):
        metadata = _metadata(opened, fused, facts, graph)
        written = write_safetensors(out, final.tensors, metadata, force=force, source=path, dry_run=dry_run)
    output = OutputFacts(str(out), written.size_bytes, written.sha256, dry_run)
    return replace(facts, output=output, seconds=clock.seconds)


def _fuse_result(
    opened: Opened,
    program: Program,
    is_guessed: bool,
    fused: Fused,
    final: Program,
    verification: Verification,
    clock: _Clock,
) -> Result:
    blocks = tuple(
        block_facts(block, certificate)
        for block, certificate in zip(fused.plan.blocks, fused.certificates, strict=True)
    )
    left_out = sorted(set(program.tensors) - set(final.tensors) - {k for b in fused.plan.blocks for k in b.sources})
    unread = [key for key in left_out if not key.endswith("num_batches_tracked")]
    notes = list(program.notes)
    if unread:
        notes.append(f"{len(unread)} tensors that no output depends on were left out, such as {unread[0]}")
    return Result(
        "fuse",
        opened.facts,
        input_facts(program, is_guessed),
        blocks,
        tuple(refusal_facts(fused.plan)),
        totals(fused.plan, final),
        verification,
        notes=tuple(notes),
        seconds=clock.seconds,
    )


def _fuse(program: Program, options: Options, progress: Progress | None) -> Fused:
    return fuse_program(
        program,
        proof_inputs(program, options.seed),
        dtype=program.dtype(),
        only=options.blocks,
        seed=options.seed,
        progress=progress,
    )


def exit_code(result: Result, strict: bool) -> int:
    """Return 0, or 1 where outputs differ, or under ``strict`` where something was refused, unchecked or not there."""
    verification = result.verification
    if verification is not None and not verification.passed:
        return 1
    is_incomplete = bool(result.refusals) or (verification is not None and verification.verdict != "pass")
    has_nothing = result.command == "fuse" and not result.blocks
    return int(strict and (is_incomplete or has_nothing))


def _compare(
    original: Program, module: nn.Module, fused: Program, fused_module: nn.Module, options: Options
) -> Verification:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        inputs = random_inputs(original, options.samples, options.seed)
        return compare(original, module, fused, fused_module, inputs, options.limits)
    finally:
        for part, training in modes:
            part.training = training


def _metadata(opened: Opened, fused: Fused, facts: Result, graph: str) -> dict[str, str]:
    """Return the file's metadata; no time and no absolute path, so that equal input gives equal bytes."""
    key_map = {key: list(fusion.block.sources) for fusion in fused.fusions for key in fusion.keys}
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
        "format": "pt",
        "repconv.format": FORMAT_VERSION,
        "repconv.version": __version__,
        "repconv.source": json.dumps(source),
        "repconv.key_map": json.dumps(key_map),
        "repconv.verification": json.dumps(figures),
        "repconv.graph": graph,
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
        return ProgramModule(_program_in(found)).eval()
    except RepconvError as error:
        raise error.at(str(path)) from error


def verify(
    source: str | Path | nn.Module,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Result:
    """Judge the file that lies at ``out`` against ``source``: outputs, and each fused tensor against a new plan."""
    options, clock = options or Options(), _Clock(progress)
    with clock.phase("Reading"):
        opened = open_source(source, options)
        written = open_source(out, replace(options, arch=None, state_key=None))
        if not written.is_fused:
            raise InputError(
                "it holds no graph, so its outputs cannot be computed", where=str(out), needed="a file that fuse wrote"
            )
        assert written.program is not None
        stored = written.program
    with clock.phase("Tracing"):
        program, is_guessed = trace_source(opened, options)
        _require_same_call(program, stored, str(out))
    with clock.phase("Comparing outputs"):
        verification = _compare(program, opened.module, stored, ProgramModule(stored), options)
    with clock.phase("Redoing the plan"):
        verification = _check_tensors(verification, program, stored, options)
    return Result(
        "verify",
        opened.facts,
        input_facts(program, is_guessed),
        verification=verification,
        output=OutputFacts(str(out), written.facts.size_bytes or 0, written.facts.sha256 or "", False),
        notes=program.notes,
        seconds=clock.seconds,
    )


def _require_same_call(program: Program, stored: Program, out: str) -> None:
    mine = [(len(i.shape), i.dtype) for i in program.inputs]
    theirs = [(len(i.shape), i.dtype) for i in stored.inputs]
    if mine != theirs:
        raise InputError(
            f"its inputs are {[str(d) for _, d in theirs]}, the source's {[str(d) for _, d in mine]}", where=out
        )
    for info, fixed in zip(program.inputs, stored.inputs, strict=True):
        if any(size is not None and size != own for size, own in zip(fixed.shape, info.example, strict=True)):
            raise InputError(f"its input is fixed to {fixed.shape}, the comparison uses {info.example}", where=out)


def _check_tensors(verification: Verification, program: Program, stored: Program, options: Options) -> Verification:
    """Compare every tensor in the file with what a new plan gives; name the first block that is off."""
    fused = _fuse(program, replace(options, blocks=None), None)
    final = fused.program
    if set(final.tensors) != set(stored.tensors):
        reason = "the file's tensors are not those of a new plan, so they were judged by the outputs alone"
        return replace(verification, not_checked=(*verification.not_checked, reason))
    difference = first_difference(fused, final, stored)
    if difference is None:
        found = replace(verification, tensors_checked=len(stored.tensors))
        if found.passed:
            return found
        block = first_block_off(fused, final, stored, next(random_inputs(program, 1, options.seed)))
        looks = None if block is None else f"{block} has the right weights, and is not computed as it should be"
        return replace(found, first_bad_block=block, looks_like=looks)
    return replace(
        verification,
        verdict="fail",
        passed=False,
        tensors_checked=len(stored.tensors),
        first_bad_block=difference.block,
        looks_like=looks_like(difference),
    )
