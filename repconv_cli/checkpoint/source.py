"""A SOURCE read from disk: what it is, what it holds, and what was done to find it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from repconv_cli.checkpoint.folders import CONFIG, Layout, check_shards, layout_of, layout_of_index
from repconv_cli.checkpoint.formats import FileFormat, open_regular, recognise
from repconv_cli.checkpoint.hashing import digest_of, digest_of_all
from repconv_cli.checkpoint.hub_config import ModelConfig, read_config
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.checkpoint.reading import FileBytes
from repconv_cli.checkpoint.wrappers import prefix_notes, without_prefixes
from repconv_cli.errors import InputError, RepconvError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from repconv_cli.checkpoint.pt2 import ProgramFile

Kind = Literal["module", "weights", "program"]
GRAPH = "repconv.graph"
"""The entry of a safetensors file's free text that holds the graph of a file of ours."""
TARGET = "repconv.target"
"""The entry that tells that a file of ours holds the tensors of a deploy class."""


@dataclass(frozen=True)
class Source:
    """A checked source. Exactly one of ``module``, ``tensors`` and ``program`` is set, as ``kind`` says.

    Attributes:
        path: the file or folder as the user named it.
        kind: ``module`` (an ``nn.Module``), ``weights`` (tensors by name) or ``program`` (a torch.export graph).
        format: the container, told by content.
        sha256: of the whole file, as hexadecimal digits; of several files, as ``digest_of_all`` combines them.
        size_bytes: of the whole file, or of all of them.
        module: made from the file, on the CPU, as it was saved: ``was_training`` tells its mode.
        tensors: on the CPU, detached; tied weights share memory. Those of a large file are views of its own pages,
            which take memory only once they are used; ``release`` gives that back.
        prefixes: what was taken off the front of every tensor's name, in order.
        program: the graph with its weights.
        config: the model that a ``config.json`` beside the weights describes.
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
    prefixes: tuple[str, ...] = ()
    program: ProgramFile | None = None
    config: ModelConfig | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    was_training: bool = False
    files: tuple[FileBytes, ...] = ()

    def release(self) -> None:
        """Let go of the memory that used tensors of a large file take. Their values stay: nothing may write to them."""
        for file in self.files:
            file.release()


def read(path: str | Path, *, state_key: str | None = None, trust: Sequence[str] = ()) -> Source:
    """Return what ``path`` holds, with every byte checked that can be checked and nothing in it run.

    ``path`` is a file, the index of a sharded checkpoint, or a folder as model hubs lay it out. ``state_key`` names
    the entry of a checkpoint to take the weights from. ``trust`` names installed packages whose ``nn.Module`` classes
    may be made (empty, then given their state) besides those of ``torch.nn``.

    Raises:
        InputError: the path cannot be read, is another kind of file, or holds nothing that can be fused.
        DamagedFileError: the file is cut short, fails a checksum, or contradicts itself.
        UnsafeFileError: the file asks for something that could run code; what it asks for is named.
    """
    named = Path(path)
    try:
        found = _read_any(named, state_key, trust)
    except RepconvError as error:
        raise error.at(quoted(named, limit=200)) from None
    except MemoryError:
        raise InputError("it does not fit into memory", where=quoted(named, limit=200)) from None
    # What reads the tensors of a file of ours, its graph or a deploy class, knows them by the names in it.
    if found.tensors is None or GRAPH in found.metadata or TARGET in found.metadata:
        return found
    tensors, prefixes = without_prefixes(found.tensors)
    notes = (*found.notes, *prefix_notes(prefixes, len(tensors)))
    return replace(found, tensors=tensors, prefixes=prefixes, notes=notes)


def _read_any(path: Path, state_key: str | None, trust: Sequence[str]) -> Source:
    if os.path.isdir(path):
        return _read_layout(path, layout_of(path), state_key, trust)
    with open_regular(path) as handle:
        found = recognise(handle)
        if found is not FileFormat.INDEX:
            return _read_open(path, handle, found, state_key, trust)
    config = path.parent / CONFIG
    return _read_layout(path, layout_of_index(path, config if os.path.exists(config) else None), state_key, trust)


def _read_layout(path: Path, layout: Layout, state_key: str | None, trust: Sequence[str]) -> Source:
    """Return the weights of all files together, and the model that they belong to if ``config.json`` tells."""
    config = read_config(layout.config) if layout.config is not None else None
    parts: list[Source] = []
    for file in layout.files:
        try:
            with open_regular(file) as handle:
                parts.append(_read_open(file, handle, recognise(handle), state_key, trust))
        except RepconvError as error:
            raise error.at(quoted(file, limit=200)) from None
    if len(parts) == 1 and parts[0].kind != "weights":
        return replace(parts[0], path=path, notes=(*layout.notes, *parts[0].notes))
    check_shards(layout, {part.path.name: list(part.tensors or ()) for part in parts})
    digests = [(part.path.name, part.sha256) for part in parts]
    return replace(
        parts[0],
        path=path,
        sha256=digests[0][1] if path == parts[0].path else digest_of_all(digests),
        size_bytes=sum(part.size_bytes for part in parts),
        tensors={name: tensor for part in parts for name, tensor in (part.tensors or {}).items()},
        config=config,
        notes=(*layout.notes, *dict.fromkeys(note for part in parts for note in part.notes)),
        files=tuple(file for part in parts for file in part.files),
    )


def _read_open(path: Path, handle: BinaryIO, found: FileFormat, state_key: str | None, trust: Sequence[str]) -> Source:
    size = os.fstat(handle.fileno()).st_size
    is_checkpoint = found in (FileFormat.TORCH_ZIP, FileFormat.TORCH_LEGACY)
    if state_key is not None and not is_checkpoint:
        raise InputError(f"--state-key chooses an entry of a torch checkpoint, and this is {found.value}")
    with digest_of(handle) as digest:
        if found is FileFormat.SAFETENSORS:
            source = _read_safetensors(path, handle, size)
        elif found is FileFormat.EXPORTED:
            source = _read_program(path, handle, size)
        elif is_checkpoint or found is FileFormat.TORCHSCRIPT:
            source = _read_checkpoint(path, handle, found, size, state_key, trust)
        else:
            raise InputError(f"this is {found.value}, inside of another one")
        return replace(source, sha256=digest.hexdigest())


def _read_checkpoint(
    path: Path, handle: BinaryIO, found: FileFormat, size: int, state_key: str | None, trust: Sequence[str]
) -> Source:
    from torch import nn

    from repconv_cli.checkpoint.rebuild import Rebuilder
    from repconv_cli.checkpoint.records import InstanceRecord
    from repconv_cli.checkpoint.torch_file import open_legacy, open_zip
    from repconv_cli.checkpoint.torchscript import open_script
    from repconv_cli.checkpoint.values import check_module, check_values

    if found is FileFormat.TORCHSCRIPT:
        saved = open_script(handle)
    else:
        saved = (open_zip if found is FileFormat.TORCH_ZIP else open_legacy)(handle, trust)
    inside = saved.unwrapped(state_key)
    if isinstance(inside.content, InstanceRecord):
        # A module's forward may write to what it holds.
        saved.file.keep_in_memory()
    with saved.storages() as read_storage:
        maker = Rebuilder(read_storage, trust)
        content = maker.rebuild(inside.content)
    notes = inside.notes
    if isinstance(content, nn.Module):
        check_module(content)
        training = any(part.training for part in content.modules())
        if maker.unread:
            notes = (*notes, f"objects in the module that were not read: {listed(maker.unread)}")
        return Source(path, "module", found, "", size, module=content, notes=notes, was_training=training)
    tensors = {name: tensor.detach() for name, tensor in cast("dict[str, torch.Tensor]", content).items()}
    check_values(tensors, size, saved.file.release)
    return Source(path, "weights", found, "", size, tensors=tensors, notes=notes, files=(saved.file,))


def _read_safetensors(path: Path, handle: BinaryIO, size: int) -> Source:
    from repconv_cli.checkpoint.safetensors_file import read_header, read_tensors
    from repconv_cli.checkpoint.values import check_values

    header = read_header(handle)
    if not header.tensors:
        raise InputError("it holds no tensors")
    file = FileBytes(handle)
    if GRAPH in header.metadata:
        # It becomes a model that the caller may train.
        file.keep_in_memory()
    tensors = read_tensors(file, header)
    check_values(tensors, size, file.release, are_proven=GRAPH in header.metadata)
    form = FileFormat.SAFETENSORS
    return Source(path, "weights", form, "", size, tensors=tensors, metadata=header.metadata, files=(file,))


def _read_program(path: Path, handle: BinaryIO, size: int) -> Source:
    from repconv_cli.checkpoint.pt2 import read_program
    from repconv_cli.checkpoint.values import check_values

    program = read_program(handle)
    check_values(program.tensors, size, are_proven=True)
    return Source(path, "program", FileFormat.EXPORTED, "", size, program=program)
