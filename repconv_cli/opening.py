"""A source opened: read, made a module, and traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from repconv_cli.checkpoint import FileFormat, Source, read
from repconv_cli.checkpoint.architectures import Architecture, from_config, make_architecture
from repconv_cli.checkpoint.loading import load_weights
from repconv_cli.checkpoint.named_inputs import read_inputs
from repconv_cli.checkpoint.program import ProgramFile
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.values import check_module
from repconv_cli.checkpoint.wrappers import prefix_notes
from repconv_cli.errors import InputError, RepconvError, TraceError
from repconv_cli.exported import module_of
from repconv_cli.graph.allowance import most_elements, require_inputs_within, require_program_within
from repconv_cli.graph.batches import is_same_for_one
from repconv_cli.graph.export import MayVary
from repconv_cli.graph.inputs import Example, guess_shape
from repconv_cli.graph.program import InputInfo, Program, ProgramModule
from repconv_cli.graph.serial import from_json
from repconv_cli.graph.sizes import check_sizes
from repconv_cli.graph.trace import trace
from repconv_cli.options import Options
from repconv_cli.results import SourceFacts

FORMAT_VERSION = "1"


@dataclass(frozen=True)
class Opened:
    """A source as a module that can be traced, and what is known of it.

    ``program`` is the graph that the source holds, if it holds one (``.pt2``, or a file that ``fuse`` wrote): it
    tells how the model is called. ``architecture`` is what its weights were loaded into.
    """

    module: nn.Module
    facts: SourceFacts
    program: Program | None = None
    is_fused: bool = False
    architecture: Architecture | None = None
    saved: frozenset[str] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file of this model's weights holds, by key: buffers that are not saved are not in it."""
        state = self.module.state_dict()
        kept = state if self.saved is None else self.saved
        return {key: value.detach() for key, value in state.items() if isinstance(value, Tensor) and key in kept}


@dataclass(frozen=True)
class WeightsAlone:
    """Tensors by key, and no graph; ``prefix`` is what was taken off all keys.

    ``release`` lets go of the memory of tensors that were read, as :meth:`Source.release` does.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: SourceFacts
    release: Callable[[], None]
    prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_torchscript: bool = False


def open_source(source: str | Path | nn.Module, options: Options) -> Opened | WeightsAlone:
    """Return ``source`` as a module: itself, or what the file holds, or the architecture with the file's weights.

    A file of tensors without an architecture is weights alone.
    """
    if isinstance(source, nn.Module):
        check_module(source)
        notes = (_TRAINING_NOTE.format("given"),) if source.training else ()
        facts = SourceFacts(
            type(source).__name__, "module", None, None, *_tensor_facts(source.state_dict()), source.training, notes
        )
        return Opened(source, facts)
    found = read(source, state_key=options.state_key, trust=options.trust)
    try:
        return _open_file(found, options)
    except RepconvError as error:
        error.at(str(source))
        raise


def _open_file(found: Source, options: Options) -> Opened | WeightsAlone:
    notes = list(found.notes)
    program: Program | None = None
    architecture: Architecture | None = None
    saved: frozenset[str] | None = None
    if found.kind != "weights" and options.arch is not None:
        raise InputError(f"it holds a whole {found.kind}, so --arch is not needed", hint="Leave --arch out.")
    if found.module is not None:
        module = found.module
    elif found.program is not None:
        holder, program_notes = module_of(found.program)
        module, program = holder, holder.held_program
        saved = _saved(found.program)
        notes += program_notes
    elif options.arch is None and "repconv.graph" in found.metadata:
        program = program_in(found)
        module = ProgramModule(program).eval()
    elif options.arch is None and found.config is None:
        return _alone(found)
    else:
        architecture, told = _architecture(found, options.arch)
        module, notes = architecture.module, list(told)
    if found.was_training:
        notes.append(_TRAINING_NOTE.format("saved"))
    is_fused = found.program is None and program is not None
    facts = SourceFacts(
        str(found.path),
        "fused" if is_fused else found.kind,
        found.sha256,
        found.size_bytes,
        *_tensor_facts(module.state_dict()),
        found.was_training,
        tuple(notes),
    )
    return Opened(module, facts, program, is_fused, architecture, saved, found.metadata)


def _alone(found: Source) -> WeightsAlone:
    assert found.tensors is not None
    facts = SourceFacts(
        str(found.path),
        "weights alone",
        found.sha256,
        found.size_bytes,
        *_tensor_facts(found.tensors),
        False,
        found.notes,
    )
    is_torchscript = found.format is FileFormat.TORCHSCRIPT
    return WeightsAlone(
        found.path, found.tensors, facts, found.release, "".join(found.prefixes), found.metadata, is_torchscript
    )


def _saved(program: ProgramFile) -> frozenset[str]:
    """Return the keys that the exported model's own state dict has."""
    kinds = ("parameter", "buffer")
    return frozenset(i.key for i in program.inputs if i.key is not None and i.kind in kinds and i.persistent)


_ONE_SAMPLE_NOTE = "the batch is fixed to one sample: the model does not treat every batch alike, or it cannot be shown"
_TRAINING_NOTE = "the module was {} in training mode; it is used in eval mode"


def _architecture(found: Source, arch: str | None) -> tuple[Architecture, tuple[str, ...]]:
    """Return the architecture with the weights in it, and the sentences on how they were found and fitted."""
    assert found.tensors is not None
    if arch is not None:
        made = make_architecture(arch)
    else:
        assert found.config is not None
        made = from_config(found.config, found.tensors)
    fitted = load_weights(made.module, found.tensors, found.prefixes)
    notes = found.notes
    if any("which therefore stayed" in note for note in fitted):
        taken = prefix_notes(found.prefixes, len(found.tensors))
        notes = tuple(note for note in notes if note not in taken)
    return made, (*notes, *made.notes, *fitted)


def program_in(found: Source) -> Program:
    """Return the graph that a file of ours holds. Raises :class:`InputError` if it is of another version."""
    assert found.tensors is not None
    version = found.metadata.get("repconv.format", "?")
    if version != FORMAT_VERSION:
        raise InputError(f"its format version is {version[:20]!r}", needed=FORMAT_VERSION, hint="Use a newer repconv.")
    program = from_json(found.metadata["repconv.graph"], found.tensors)
    extra = set(found.tensors) - set(program.tensors)
    # A deploy class also has tensors that its outputs do not depend on, such as counters.
    if extra and found.metadata.get("repconv.target") != "deploy":
        raise InputError(
            f"it holds {len(extra)} tensors that its graph does not read, such as {sorted(extra)[0][:60]!r}"
        )
    check_sizes(program)
    return program


def _tensor_facts(tensors: Mapping[str, object]) -> tuple[str, int]:
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
    most = most_elements(opened.facts.size_bytes, is_asked=bool(options.input or options.inputs or options.example))
    if held is not None:
        infos = _resized(held.inputs, options.input)
        example = Example(infos, held.arguments, held.keywords)
        may_vary = tuple(tuple(size is None for size in info.shape) for info in infos)
    else:
        example = own_example(opened.module, options) or _example(opened, options.input, dtype, most)
    require_inputs_within(example.infos, most)
    program = _traced(opened, example, may_vary, most)
    tells_one = held is None and not is_same_for_one(program, opened.module, *example.tensors())
    is_ours = held is None and example.values is None
    if is_ours and all(shape[0] == 1 for shape in options.input) and (tells_one or _has_fixed_batch(program)):
        # Batches of two were a means to keep the batch free; where that fails, one sample is what was asked for.
        program = _traced(opened, example.of_one_sample(), may_vary, most)
        program = replace(program, notes=(*program.notes, _ONE_SAMPLE_NOTE))
    elif tells_one:
        program = _traced(opened, example, tuple((False, *(True,) * 7) for _ in example.infos), most)
    return program, is_ours and not options.input


def _traced(opened: Opened, example: Example, may_vary: MayVary, most: int) -> Program:
    """Return the program, which makes no tensor of more than ``most`` elements: nothing was run so far."""
    args, kwargs = example.tensors()
    try:
        program = trace(opened.module, args, kwargs, may_vary=may_vary)
    except TraceError as error:
        shapes = ", ".join("×".join(map(str, info.example)) for info in example.infos)
        error.at(f"{opened.facts.name} with input {shapes}")
        raise
    require_program_within(program, most)
    return program


def _has_fixed_batch(program: Program) -> bool:
    return any(info.shape and info.shape[0] is not None for info in program.inputs)


def own_example(module: nn.Module, options: Options) -> Example | None:
    """Return the call that the user gave: tensors, or a file of them, by the names that ``forward`` has for them."""
    if options.example is not None:
        return Example.of(*options.example)
    if options.inputs is None:
        return None
    tensors = read_inputs(options.inputs)
    names = inspect.signature(module.forward).parameters
    if set(tensors) <= set(names):
        return Example.of(*_by_place(names, tensors))
    known = ", ".join(names)
    if all(name.startswith(("arr_", "input_")) for name in tensors):
        return Example.of(tuple(tensors.values()), {})
    odd = next(name for name in tensors if name not in names)
    raise InputError(
        f"it holds {quoted(odd)}, which is no input of the model",
        where=quoted(options.inputs, limit=200),
        needed=f"names among {known}, or arr_0, arr_1, … for inputs by their order",
    )


def _by_place(
    parameters: Mapping[str, inspect.Parameter], tensors: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return (args, kwargs): the first parameters by place as far as they are given, as a model is mostly called."""
    left, args = dict(tensors), []
    for name, parameter in parameters.items():
        if name not in left or parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            break
        args.append(left.pop(name))
    return tuple(args), left


def _example(opened: Opened, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, most: int) -> Example:
    """Return example inputs of the sizes that the user gave, or that the architecture tells, or that fit."""
    known = opened.architecture
    keyword = known.input_name if known is not None else None
    if not shapes and known is not None and known.input_size is not None:
        shapes = ((2, *known.input_size),)
    if not shapes:
        shapes = (guess_shape(opened.module, dtype, most, keyword),)
    if keyword is not None and len(shapes) == 1:
        return Example.keyword(keyword, shapes[0], dtype)
    return Example.positional(shapes, dtype)


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
