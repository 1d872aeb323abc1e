"""An ONNX model on disk: the file alone, or with its tensors in one file beside it, as the source has them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from repconv_cli.checkpoint import Writing, WrittenFile, check_output, write_chunks
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError, OutputError
from repconv_cli.onnx.external import extent_of, is_external
from repconv_cli.onnx.reading import OnnxFile, read_onnx, tensors_in
from repconv_cli.onnx.session import one_line
from repconv_cli.onnx.values import DTYPES

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# What does not fit into one protobuf message, with room for the graph.
_MOST_INSIDE = 1_900_000_000
# Smaller tensors stay in the model: shapes and axes, which readers want to see.
_SMALLEST_OUTSIDE = 1024
# Readers map the file into memory.
_ALIGNMENT = 4096


@dataclass(frozen=True)
class _Piece:
    """A tensor that goes into the other file, its bytes, and where they start."""

    tensor: TensorProto
    offset: int
    length: int


def write_onnx(
    path: str | Path, model: ModelProto, source: OnnxFile | None, *, force: bool, dry_run: bool
) -> WrittenFile:
    """Return the file that now holds ``model``, read back and checked.

    Tensors that ``source`` has in other files go into one file beside ``path``, called after it and after their
    content, so that a model that is replaced never meets the tensors of another. ``model`` is changed: it then refers
    to that file.
    """
    check_output(path, force=force, source=None if source is None else source.path)
    folder = Path(path).parent if source is None else source.folder
    is_valid = source is None or complaint(source.model) is None
    inside = sum(len(tensor.raw_data) for tensor in tensors_in(model))
    has_external = any(is_external(tensor) for tensor in tensors_in(model)) or (
        source is not None and source.has_external()
    )
    if not has_external and inside <= _MOST_INSIDE:
        return _write_model(path, model, source, is_valid, force=force, dry_run=dry_run)
    target = Path(os.path.realpath(path))
    earlier = _own_data_files(target)
    pieces = _pieces(model)
    digest = hashlib.sha256()
    for chunk in _bytes_of(pieces, folder):
        digest.update(chunk)
    beside = target.with_name(f"{target.name}.{digest.hexdigest()[:8]}.data")
    is_new = not beside.exists()
    data = write_chunks(beside, _bytes_of(pieces, folder), lambda *_: None, force=True)
    try:
        for piece in pieces:
            _refer(piece, beside.name)
        written = _write_model(path, model, source, is_valid, force=force, dry_run=dry_run)
    except BaseException:
        if is_new:
            beside.unlink(missing_ok=True)
        raise
    for old in [beside] * (dry_run and is_new) + [old for old in earlier if old != beside and not dry_run]:
        with suppress(OSError):
            old.unlink()
    return replace(written, size_bytes=written.size_bytes + data.size_bytes)


def set_metadata(model: ModelProto, entries: Mapping[str, str]) -> None:
    """Set these entries of the model's metadata; all others stay, in their order."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)


def complaint(model: ModelProto) -> str | None:
    """Return what onnx's checker says against ``model``, None if nothing; tensors in other files are not looked at."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in tensors_in(bare):
        if is_external(tensor) or len(tensor.raw_data) > _SMALLEST_OUTSIDE:
            _empty(tensor)
    try:
        onnx.checker.check_model(bare)
    except Exception as error:  # noqa: BLE001 - the checker raises types of its own
        return one_line(error)
    return None


def _empty(tensor: TensorProto) -> None:
    """Make ``tensor`` one without values: what is checked is the graph."""
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.ClearField("raw_data")
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    del tensor.dims[:]
    tensor.dims.append(0)


def _write_model(
    path: str | Path, model: ModelProto, source: OnnxFile | None, is_valid: bool, *, force: bool, dry_run: bool
) -> WrittenFile:
    try:
        data = model.SerializeToString()
    except ValueError as error:
        raise OutputError("the model is too large for one ONNX file", where=quoted(path, limit=200)) from error

    def check(temporary: Path, written: Writing) -> None:
        written.sha256()
        found = read_onnx(temporary).model
        if found != model:
            raise OutputError("what was read back is not what was written", hint="The disk may be failing.")
        said = complaint(found)
        if said is not None and is_valid:
            raise OutputError(f"onnx's checker refuses it: {said}", hint="Please report this model.")

    origin = None if source is None else source.path
    return write_chunks(path, iter([data]), check, force=force, source=origin, dry_run=dry_run)


def _pieces(model: ModelProto) -> list[_Piece]:
    pieces, offset = [], 0
    for tensor in tensors_in(model):
        dtype = DTYPES.get(tensor.data_type)
        if is_external(tensor) and dtype is not None:
            length = prod(tensor.dims) * dtype.itemsize
        elif len(tensor.raw_data) >= _SMALLEST_OUTSIDE:
            length = len(tensor.raw_data)
        else:
            continue
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        pieces.append(_Piece(tensor, offset, length))
        offset += length
    return pieces


def _bytes_of(pieces: list[_Piece], folder: Path) -> Iterator[bytes | memoryview]:
    position = 0
    for piece in pieces:
        yield b"\0" * (piece.offset - position)
        position = piece.offset + piece.length
        if is_external(piece.tensor):
            yield memoryview(extent_of(piece.tensor, folder, piece.length).read())
        else:
            yield piece.tensor.raw_data


def _refer(piece: _Piece, name: str) -> None:
    tensor = piece.tensor
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", name), ("offset", piece.offset), ("length", piece.length)):
        tensor.external_data.add(key=key, value=str(value))


def _own_data_files(target: Path) -> list[Path]:
    """Return the files that the model there now has its tensors in, those alone that were written here."""
    if not target.exists():
        return []
    try:
        model = read_onnx(target).model
    except InputError:
        return []
    named = {e.value for tensor in tensors_in(model) for e in tensor.external_data if e.key == "location"}
    own = re.compile(re.escape(target.name) + r"\.[0-9a-f]{8}\.data")
    return [target.with_name(name) for name in named if own.fullmatch(name)]
