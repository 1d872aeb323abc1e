"""What weights a source holds, told from its headers and pickles alone: no tensor is read, no torch imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from repconv_cli.checkpoint.folders import CONFIG, Layout, check_shards, layout_of, layout_of_index
from repconv_cli.checkpoint.formats import FileFormat, open_regular, opens_onnx, recognise
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.records import InstanceRecord, ParameterRecord, TensorRecord
from repconv_cli.checkpoint.safetensors_file import DTYPES, read_header
from repconv_cli.checkpoint.source import GRAPH
from repconv_cli.checkpoint.torch_file import open_legacy, open_zip
from repconv_cli.checkpoint.torchscript import open_script
from repconv_cli.checkpoint.wrappers import prefix_notes, without_prefixes
from repconv_cli.errors import RepconvError


@dataclass(frozen=True)
class Claim:
    """A tensor as its header describes it; whether its bytes are sound is not known."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """The weights that a source holds, by name, without their values."""

    format: FileFormat
    size_bytes: int
    tensors: dict[str, Claim]
    notes: tuple[str, ...]


def list_weights(path: str | Path, *, state_key: str | None = None, trust: Sequence[str] = ()) -> Listing | None:
    """Return the weights that ``path`` holds; None if it holds, or has beside it, what makes a graph of them.

    Raises:
        InputError: as :func:`repconv_cli.checkpoint.read`, for what headers and pickles show.
    """
    named = Path(path)
    try:
        found = _list_any(named, state_key, trust)
    except RepconvError as error:
        raise error.at(quoted(named, limit=200)) from None
    if found is None:
        return None
    tensors, prefixes = without_prefixes(found.tensors)
    return Listing(found.format, found.size_bytes, tensors, (*found.notes, *prefix_notes(prefixes, len(tensors))))


def _list_any(path: Path, state_key: str | None, trust: Sequence[str]) -> Listing | None:
    if os.path.isdir(path):
        return _list_layout(layout_of(path), state_key, trust)
    with open_regular(path) as handle:
        if opens_onnx(handle.read(64)):
            return None
        found = recognise(handle)
        if found is not FileFormat.INDEX:
            return _list_open(handle, found, state_key, trust)
    config = path.parent / CONFIG
    return _list_layout(layout_of_index(path, config if os.path.exists(config) else None), state_key, trust)


def _list_layout(layout: Layout, state_key: str | None, trust: Sequence[str]) -> Listing | None:
    if layout.config is not None:
        return None
    parts: dict[str, Listing] = {}
    for file in layout.files:
        with open_regular(file) as handle:
            part = _list_open(handle, recognise(handle), state_key, trust)
        if part is None:
            return None
        parts[file.name] = part
    check_shards(layout, {name: list(part.tensors) for name, part in parts.items()})
    every = list(parts.values())
    return Listing(
        every[0].format,
        sum(part.size_bytes for part in every),
        {name: claim for part in every for name, claim in part.tensors.items()},
        (*layout.notes, *dict.fromkeys(note for part in every for note in part.notes)),
    )


def _list_open(handle: BinaryIO, found: FileFormat, state_key: str | None, trust: Sequence[str]) -> Listing | None:
    size = os.fstat(handle.fileno()).st_size
    if found is FileFormat.SAFETENSORS:
        header = read_header(handle)
        if GRAPH in header.metadata:
            return None
        claims = {name: Claim(DTYPES[entry.dtype], entry.shape) for name, entry in header.tensors.items()}
        return Listing(found, size, claims, ())
    if found not in (FileFormat.TORCH_ZIP, FileFormat.TORCH_LEGACY, FileFormat.TORCHSCRIPT):
        return None
    if found is FileFormat.TORCHSCRIPT:
        saved = open_script(handle)
    else:
        saved = (open_zip if found is FileFormat.TORCH_ZIP else open_legacy)(handle, trust)
    inside = saved.unwrapped(state_key)
    if isinstance(inside.content, InstanceRecord):
        return None
    return Listing(found, size, dict(_claims(inside.content)), inside.notes)


def _claims(tensors: dict[str, TensorRecord | ParameterRecord]) -> Iterator[tuple[str, Claim]]:
    for name, value in tensors.items():
        tensor = value.data if isinstance(value, ParameterRecord) else value
        yield name, Claim(tensor.dtype, tensor.size)
