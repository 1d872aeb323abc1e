"""safetensors files: the header is checked against the bytes present before any tensor is made."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.reading import FileBytes, require_few_parts
from repconv_cli.errors import DamagedFileError, InputError

if TYPE_CHECKING:
    import torch

MOST_HEADER_BYTES = 100_000_000
MOST_AXES = 25

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
"""safetensors' name of a dtype, and torch's."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8,
    "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

_AGAIN = "Download or save it again."


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a header: its type, shape, and the bytes it takes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Header(msgspec.Struct, frozen=True):
    """A checked header: tensors by name in the order of their bytes, free text, and where the bytes start."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_header(handle: BinaryIO) -> Header:
    """Return the header of an open safetensors file, without torch.

    Raises:
        DamagedFileError: the header is cut short, is not what the format prescribes, or claims other bytes than
            the file has: every byte belongs to exactly one tensor.
        InputError: a tensor has a dtype that is not read here, or there are too many of them.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    length = int.from_bytes(handle.read(8), "little")
    if length > min(size - 8, MOST_HEADER_BYTES):
        raise DamagedFileError(
            f"its header claims {length} bytes", needed=f"at most {min(size - 8, MOST_HEADER_BYTES)}", hint=_AGAIN
        )
    tensors, metadata = _parsed(handle.read(length))
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].data_offsets, item[0])))
    _check_places(ordered, size - 8 - length)
    return Header(ordered, metadata, 8 + length)


def read_tensors(file: FileBytes, header: Header) -> dict[str, torch.Tensor]:
    """Return every tensor of the file whose header has been checked: views of a large file, copies of a small one.

    The bytes come from the file that was checked, even if another one has taken its name since.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for name, entry in header.tensors.items():
        begin, end = entry.data_offsets
        raw = file.take(header.data_start + begin, end - begin, f"tensor {quoted(name)}")
        tensors[name] = raw.view(getattr(torch, DTYPES[entry.dtype])).reshape(entry.shape)
    return tensors


def _parsed(text: bytes) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    require_few_parts(text, "its header")
    try:
        pairs = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(pairs, dict):
            raise ValueError("not an object")
        metadata = msgspec.convert(pairs.pop("__metadata__", None) or {}, dict[str, str])
        return msgspec.convert(pairs, dict[str, TensorEntry]), metadata
    except (ValueError, RecursionError):
        raise DamagedFileError("its header is not a table of tensors", hint=_AGAIN) from None


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_places(tensors: dict[str, TensorEntry], available: int) -> None:
    end = 0
    for name, entry in tensors.items():
        if entry.dtype not in DTYPES:
            raise InputError(f"tensor {quoted(name)} is of type {quoted(entry.dtype)}, which is not read here")
        if len(entry.shape) > MOST_AXES or any(n < 0 for n in entry.shape):
            raise DamagedFileError(f"tensor {quoted(name)} has no possible shape")
        begin, stop = entry.data_offsets
        needed = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
        if stop - begin != needed:
            raise DamagedFileError(f"tensor {quoted(name)} has {stop - begin} bytes", needed=f"{needed} for its shape")
        if begin != end:
            kind = "overlaps what comes before it" if begin < end else "comes after bytes that belong to no tensor"
            raise DamagedFileError(f"tensor {quoted(name)} {kind}")
        end = stop
    if end != available:
        raise DamagedFileError(f"its tensors take {end} bytes and the file has {available} for them", hint=_AGAIN)
