"""A SOURCE read from disk: what it is, what it holds, and what was done to find it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from repconv_cli.checkpoint.formats import FileFormat, open_regular, recognise
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.checkpoint.wrappers import without_prefixes
from repconv_cli.errors import InputError, RepconvError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from repconv_cli.checkpoint.pt2 import ProgramFile

Kind = Literal["module", "weights", "program"]


@dataclass(frozen=True)
class Source:
    """A checked source. Exactly one of ``module``, ``tensors`` and ``program`` is set, as ``kind`` says.

    Attributes:
        path: the file as the user named it.
        kind: ``module`` (an ``nn.Module``), ``weights`` (tensors by name) or ``program`` (a torch.export graph).
        format: the container, told by content.
        sha256: of the whole file, as hexadecimal digits.
        size_bytes: of the whole file.
        module: made from the file, on the CPU, as it was saved: ``was_training`` tells its mode.
        tensors: on the CPU, detached; tied weights share memory.
        program: the graph with its weights.
        metadata: the free text of a safetensors file.
        notes: one sentence for each thing that was looked through or left out, for the report.
        was_training: whether the module was saved in training mode, in any of its parts.
    """

    path: Path
    kind: Kind
    format: FileFormat
    sha256: str
    size_bytes: int
    module: nn.Module | None = None
    tensors: dict[str, torch.Tensor] | None = None
    program: ProgramFile | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    was_training: bool = False


def read(path: str | Path, *, state_key: str | None = None, trust: Sequence[str] = ()) -> Source:
    """Return what ``path`` holds, with every byte checked that can be checked and nothing in it run.

    ``state_key`` names the entry of a checkpoint to take the weights from. ``trust`` names installed packages
    whose ``nn.Module`` classes may be made (empty, then given their state) besides those of ``torch.nn``.

    Raises:
        InputError: the path cannot be read, is another kind of file, or holds nothing that can be fused.
        DamagedFileError: the file is cut short, fails a checksum, or contradicts itself.
        UnsafeFileError: the file asks for something that could run code; what it asks for is named.
    """
    named = Path(path)
    try:
        with open_regular(named) as handle:
            return _read_open(named, handle, state_key, trust)
    except RepconvError as error:
        raise error.at(quoted(named, limit=200)) from None
    except MemoryError:
        raise InputError("it does not fit into memory", where=quoted(named, limit=200)) from None


def _read_open(path: Path, handle: BinaryIO, state_key: str | None, trust: Sequence[str]) -> Source:
    found = recognise(handle)
    digest, size = _digest(handle)
    if state_key is not None and found not in (FileFormat.TORCH_ZIP, FileFormat.TORCH_LEGACY):
        raise InputError(f"--state-key chooses an entry of a torch checkpoint, and this is {found.value}")
    if found is FileFormat.SAFETENSORS:
        return _read_safetensors(path, handle, digest, size)
    if found is FileFormat.EXPORTED:
        return _read_program(path, handle, digest, size)
    return _read_checkpoint(path, handle, found, (digest, size), state_key, trust)


def _read_checkpoint(
    path: Path,
    handle: BinaryIO,
    found: FileFormat,
    identity: tuple[str, int],
    state_key: str | None,
    trust: Sequence[str],
) -> Source:
    from torch import nn

    from repconv_cli.checkpoint.rebuild import Rebuilder
    from repconv_cli.checkpoint.torch_file import open_legacy, open_zip
    from repconv_cli.checkpoint.torchscript import open_script
    from repconv_cli.checkpoint.values import check_module, check_values

    if found is FileFormat.TORCHSCRIPT:
        saved = open_script(handle)
    else:
        saved = (open_zip if found is FileFormat.TORCH_ZIP else open_legacy)(handle, trust)
    inside = saved.unwrapped(state_key)
    digest, size = identity
    maker = Rebuilder(saved.fill, trust)
    content = maker.rebuild(inside.content)
    notes = inside.notes
    if isinstance(content, nn.Module):
        check_module(content)
        training = any(part.training for part in content.modules())
        if maker.unread:
            notes = (*notes, f"objects in the module that were not read: {listed(maker.unread)}")
        return Source(path, "module", found, digest, size, module=content, notes=notes, was_training=training)
    tensors = {name: tensor.detach() for name, tensor in cast("dict[str, torch.Tensor]", content).items()}
    check_values(tensors, size)
    return Source(path, "weights", found, digest, size, tensors=tensors, notes=notes)


def _read_safetensors(path: Path, handle: BinaryIO, digest: str, size: int) -> Source:
    from repconv_cli.checkpoint.safetensors_file import read_header, read_tensors
    from repconv_cli.checkpoint.values import check_values

    header = read_header(handle)
    if not header.tensors:
        raise InputError("it holds no tensors")
    notes: list[str] = []
    tensors = read_tensors(handle, header)
    # The graph in a file of ours reads its tensors by the names that they have there.
    if "repconv.graph" not in header.metadata:
        tensors = without_prefixes(tensors, notes)
    check_values(tensors, size)
    return Source(
        path,
        "weights",
        FileFormat.SAFETENSORS,
        digest,
        size,
        tensors=tensors,
        metadata=header.metadata,
        notes=tuple(notes),
    )


def _read_program(path: Path, handle: BinaryIO, digest: str, size: int) -> Source:
    from repconv_cli.checkpoint.pt2 import read_program
    from repconv_cli.checkpoint.values import check_values

    program = read_program(handle)
    check_values(program.tensors, size)
    return Source(path, "program", FileFormat.EXPORTED, digest, size, program=program)


def _digest(handle: BinaryIO) -> tuple[str, int]:
    handle.seek(0)
    digest, size = hashlib.sha256(), 0
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
        size += len(chunk)
    handle.seek(0)
    return digest.hexdigest(), size
