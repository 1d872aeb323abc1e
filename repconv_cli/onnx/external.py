"""Tensors that lie in files beside the model: where they may lie, and reading them.

A location comes from the file. It must name an ordinary file in the model's own folder or below it: no absolute path,
no ``..``, no link that leads elsewhere. The bytes that it claims must be there before any memory is taken for them.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, UnsafeFileError

if TYPE_CHECKING:
    from onnx import TensorProto


@dataclass(frozen=True)
class Extent:
    """A run of bytes of a file."""

    path: Path
    offset: int
    length: int

    def read(self) -> bytearray:
        """Return the bytes; raise :class:`DamagedFileError` if the file has become shorter."""
        data = bytearray(self.length)
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            if handle.readinto(data) != self.length:
                raise DamagedFileError(f"{quoted(self.path.name)} ends before its tensors do")
        return data


def is_external(tensor: TensorProto) -> bool:
    """Whether the tensor's values lie in another file."""
    return tensor.data_location == tensor.EXTERNAL


def extent_of(tensor: TensorProto, folder: Path, length: int) -> Extent:
    """Return where the ``length`` bytes of ``tensor`` are.

    Raises:
        UnsafeFileError: the location leads out of ``folder``, or to something that is no ordinary file.
        DamagedFileError: the file is not there, or holds fewer bytes than the tensor claims.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _resolved(entries.get("location", ""), folder)
    offset, claimed = _number(entries, "offset", 0), _number(entries, "length", length)
    shown = quoted(path.name)
    try:
        status = os.lstat(path)
    except OSError:
        raise DamagedFileError(f"its tensors lie in {shown}, which is not there", hint="Keep both together.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"its tensors lie in {shown}, which is no ordinary file")
    if claimed != length or offset + length > status.st_size:
        raise DamagedFileError(
            f"tensor {quoted(tensor.name)} claims bytes {offset} to {offset + claimed} of {shown}",
            needed=f"{length} bytes of the {status.st_size} there",
        )
    return Extent(path, offset, length)


def _resolved(location: str, folder: Path) -> Path:
    parts = re.split(r"[/\\]", location)
    is_plain = location and location.isprintable() and ".." not in parts and ":" not in location
    if not is_plain or location.startswith(("/", "\\", "~")) or any(not part for part in parts):
        raise UnsafeFileError(f"its tensors lie outside of its folder: {quoted(location) or 'nowhere'}")
    home = Path(os.path.realpath(folder))
    path = home.joinpath(*(part for part in parts if part != "."))
    if Path(os.path.realpath(path)) != path:
        raise UnsafeFileError(f"its tensors lie behind a link: {quoted(location)}", hint="Copy the file itself there.")
    return path


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamagedFileError(f"a tensor's {key} is {quoted(text)}", needed="a number of bytes")
    return int(text)
