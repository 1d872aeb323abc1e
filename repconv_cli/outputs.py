"""What ``fuse`` writes: a safetensors file, a torch.export program or an ONNX model, told by the name's suffix.

Each is made in memory first and run as whoever loads it will run it, so that what is judged is what is written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from repconv_cli.checkpoint import Writing, WrittenFile, write_chunks, write_safetensors
from repconv_cli.checkpoint.pt2 import read_program
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError, OutputError, RepconvError
from repconv_cli.exported import module_of
from repconv_cli.graph.export import export
from repconv_cli.graph.inputs import Example
from repconv_cli.graph.interpret import run_program
from repconv_cli.graph.kept import quiet
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.onnx.exporter import cause_of, to_onnx
from repconv_cli.onnx.library import require
from repconv_cli.onnx.reading import read_onnx
from repconv_cli.onnx.session import Session, one_line
from repconv_cli.onnx.shapes import infer
from repconv_cli.onnx.translate import translate
from repconv_cli.onnx.writing import set_metadata, write_onnx
from repconv_cli.opening import Opened, WeightsAlone
from repconv_cli.verdict import random_inputs

if TYPE_CHECKING:
    from onnx import ModelProto

Model = Callable[..., Any]
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}


class Writable(Protocol):
    """What can be written."""

    def write(
        self, path: str | Path, metadata: Mapping[str, str], *, force: bool, source: Path | None, dry_run: bool
    ) -> WrittenFile:
        """Return the file that now holds it."""


class Output(Writable, Protocol):
    """A fused model as it will be written: ``model`` is called like the original, ``program`` gives its float64 run."""

    program: Program
    model: Model


@dataclass(frozen=True)
class TensorsOutput:
    """Tensors by the names of a deploy class, in a safetensors file."""

    tensors: Mapping[str, Tensor]

    def write(
        self, path: str | Path, metadata: Mapping[str, str], *, force: bool, source: Path | None, dry_run: bool
    ) -> WrittenFile:
        """Return the file that now holds them."""
        return write_safetensors(path, self.tensors, metadata, force=force, source=source, dry_run=dry_run)


def check_format(out: str | Path) -> None:
    """Raise where ``out`` asks for a format that is not written, or not without what is not installed.

    Call it before long work starts.
    """
    suffix = Path(out).suffix
    if suffix == ".onnx":
        require("onnx", "onnxruntime", "onnxscript")
    if suffix in _PICKLES:
        raise OutputError(
            f"a file whose name ends in {suffix} is opened as a pickle, and fuse writes none",
            where=quoted(out, limit=200),
            needed="a name that ends in .safetensors, .pt2 or .onnx",
        )


def make_output(out: str | Path, program: Program) -> Output:
    """Return ``program`` in the format that the suffix of ``out`` asks for."""
    suffix = Path(out).suffix
    if suffix == ".onnx":
        return OnnxOutput(program, Path(out).parent)
    if suffix == ".pt2":
        return ProgramOutput(program)
    return SafetensorsOutput(program)


class SafetensorsOutput:
    """Tensors, and the graph in the metadata."""

    def __init__(self, program: Program) -> None:
        self.graph = to_json(program)
        self.tensors = program.tensors
        self.program = from_json(self.graph, program.tensors)
        self.model: Model = ProgramModule(self.program)

    def write(
        self, path: str | Path, metadata: Mapping[str, str], *, force: bool, source: Path | None, dry_run: bool
    ) -> WrittenFile:
        """Return the file that now holds it."""
        every = {"format": "pt", **metadata, "repconv.graph": self.graph}
        return write_safetensors(path, self.tensors, every, force=force, source=source, dry_run=dry_run)


def exported(program: Program) -> ExportedProgram:
    """Return ``program`` exported by torch, sizes that are free in it free."""
    example = Example(program.inputs, program.arguments, program.keywords)
    args, kwargs = example.tensors()
    may_vary = tuple(tuple(size is None for size in info.shape) for info in program.inputs)
    with torch.no_grad(), quiet():
        return export(ProgramModule(program).eval(), args, kwargs, may_vary).program


class ProgramOutput:
    """A ``.pt2`` by torch's own exporter; judged as our own reader, which runs nothing of a file, reads it back."""

    def __init__(self, program: Program) -> None:
        made = exported(program)
        # These would be stored as a pickle, and nothing needs them.
        made._example_inputs = None
        buffer = io.BytesIO()
        with quiet():
            torch.export.save(made, buffer)
        self.data = buffer.getvalue()
        holder, _ = module_of(read_program(io.BytesIO(self.data)))
        self.program = holder.held_program
        self.model: Model = holder

    def write(
        self, path: str | Path, metadata: Mapping[str, str], *, force: bool, source: Path | None, dry_run: bool
    ) -> WrittenFile:
        """Return the file that now holds it."""
        del metadata

        def check(temporary: Path, written: Writing) -> None:
            written.sha256()
            if temporary.read_bytes() != self.data:
                raise OutputError("what was read back is not what was written", hint="The disk may be failing.")

        return write_chunks(path, iter([self.data]), check, force=force, source=source, dry_run=dry_run)


@dataclass(frozen=True)
class Written:
    """A file that ``fuse`` wrote, ready to be judged.

    ``has_foreign_names`` where not all its tensors are ours by name, ``has_planned_graph`` where its graph is written
    as the plan makes it.
    """

    program: Program
    model: Model
    tensors: dict[str, Tensor]
    size_bytes: int
    sha256: str
    has_foreign_names: bool = False
    has_planned_graph: bool = False
    not_checked: tuple[str, ...] = ()


def as_output(found: Opened | WeightsAlone) -> Written:
    """Return a file that was opened as one to be judged. Raises :class:`InputError` if it holds no graph."""
    facts = found.facts
    if isinstance(found, WeightsAlone) or found.program is None:
        raise InputError(
            "it holds no graph, so its outputs cannot be computed", where=facts.name, needed="a file that fuse wrote"
        )
    return Written(
        found.program,
        found.module,
        found.program.tensors,
        facts.size_bytes or 0,
        facts.sha256 or "",
        has_planned_graph=found.is_fused,
    )


def read_onnx_output(path: str | Path, source: Program) -> Written:
    """Return the ONNX model in ``path``, to be called like ``source``."""
    file = read_onnx(path)
    try:
        model = RuntimeModel(Session(file.model, file.folder), source)
        inference = infer(file, tuple(info.example for info in source.inputs))
        translated = translate(file, inference)
    except RepconvError as error:
        error.at(str(path))
        raise
    tensors = {name: file.tensor(proto) for name, proto in file.initializers().items()}
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    program, missing = translated.program, tuple[str, ...]()
    try:
        run_program(program, next(random_inputs(source, 1, 0)))
    except (InputError, RuntimeError):
        program, missing = replace(source, inputs=program.inputs), ("the written graph in float64",)
    return Written(program, model, known, file.size_bytes, file.sha256, has_foreign_names=True, not_checked=missing)


@dataclass
class RuntimeModel:
    """An ONNX model in onnxruntime, called like the program that it was made of; gives the tensors in order."""

    session: Session
    program: Program

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the outputs."""
        leaves = self.program.arguments.flatten(args) + self.program.keywords.flatten(kwargs)
        return self.session.run(dict(zip(self.session.inputs, leaves, strict=True)))


class OnnxOutput:
    """An ONNX model by torch's own exporter, run by onnxruntime."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = program
        self.proto = _as_onnx(program)
        self.model: Model = RuntimeModel(Session(self.proto, folder), program)

    def write(
        self, path: str | Path, metadata: Mapping[str, str], *, force: bool, source: Path | None, dry_run: bool
    ) -> WrittenFile:
        """Return the file that now holds it."""
        # Which tensors became which is told by the safetensors file alone.
        set_metadata(self.proto, {key: value for key, value in metadata.items() if key in _ONNX_METADATA})
        return write_onnx(path, self.proto, None, force=force, dry_run=dry_run)


_ONNX_METADATA = {"repconv.version", "repconv.source", "repconv.verification"}


def _as_onnx(program: Program) -> ModelProto:
    made = exported(program)
    try:
        with quiet():
            return to_onnx(made, [info.name for info in program.inputs])
    except Exception as error:
        raise OutputError(
            f"torch's exporter makes no ONNX of it: {one_line(cause_of(error))}",
            hint="Write a .safetensors file instead.",
        ) from error
