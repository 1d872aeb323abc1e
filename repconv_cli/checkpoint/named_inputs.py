"""The user's own data: named tensors from an ``.npz`` or a safetensors file."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from repconv_cli.checkpoint.formats import open_regular
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError, RepconvError

if TYPE_CHECKING:
    import torch


_SPARE_BYTES = 64 << 20
_MOST_TIMES = 16


def read_inputs(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of ``path`` by name, in its order. Arrays of Python objects are refused: they are pickles.

    Raises :class:`InputError` for a file that is neither, or holds nothing.
    """
    try:
        with open_regular(path) as handle:
            start = handle.read(2)
            handle.seek(0)
            if start == b"PK":
                found = _from_npz(path)
            else:
                from repconv_cli.checkpoint.reading import FileBytes
                from repconv_cli.checkpoint.safetensors_file import read_header, read_tensors

                found = read_tensors(FileBytes(handle), read_header(handle))
    except RepconvError as error:
        raise error.at(quoted(path, limit=200)) from None
    if not found:
        raise InputError("it holds no tensors", where=quoted(path, limit=200))
    return found


def _from_npz(path: Path) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    try:
        _require_borne_out(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, TypeError, OSError, KeyError, MemoryError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            "it cannot be read as .npz arrays of numbers", needed="an .npz or a .safetensors file"
        ) from error


def _require_borne_out(path: Path) -> None:
    """Check that the arrays of an ``.npz`` are not many times larger, unpacked, than the file."""
    size = path.stat().st_size
    allowed = _SPARE_BYTES + _MOST_TIMES * size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > allowed:
        raise InputError(f"its arrays take {unpacked} bytes in a file of {size}", needed=f"at most {allowed}")
