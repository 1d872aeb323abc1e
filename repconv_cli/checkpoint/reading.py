"""Reading runs of bytes from an open file: filled into memory, or mapped where the file is large."""

from __future__ import annotations

import mmap
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

from repconv_cli.errors import DamagedFileError, InputError

MOST_PARTS = 500_000
"""Objects and lists in a JSON text: each takes up to 250 bytes of memory, and two of the text."""


def require_few_parts(text: bytes, what: str) -> None:
    """Check that JSON takes little memory once decoded; ``what`` names it in the error.

    Raises:
        InputError: it holds more objects and lists than any model needs.
    """
    parts = text.count(b"{") + text.count(b"[")
    if parts > MOST_PARTS:
        raise InputError(f"{what} has {parts} parts", needed=f"at most {MOST_PARTS}")


if TYPE_CHECKING:
    import torch

MAPPED_FROM_BYTES = 64 << 20
"""Size of a file from which on it is mapped. A smaller one costs little memory, and is safe from being cut short."""

# Private pages that are never written need no swap space behind them; Python 3.13 has a name for this flag.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def fill_from(handle: BinaryIO, start: int, target: memoryview, what: str) -> None:
    """Fill ``target`` with the bytes of ``handle`` from ``start`` on; ``what`` names them in an error.

    Raises:
        DamagedFileError: the file ends before ``target`` is full.
    """
    handle.seek(start)
    filled = 0
    while filled < len(target):
        # One call may give less than was asked for.
        chunk = handle.read(min(len(target) - filled, 1 << 24))
        if not chunk:
            raise DamagedFileError(f"{what} ends after {filled} of {len(target)} bytes")
        target[filled : filled + len(chunk)] = chunk
        filled += len(chunk)


class FileBytes:
    """The bytes of one open file as tensors of ``uint8``: views of a mapping if it is large, else copies.

    A mapping is private: writing to a view changes memory alone, never the file. It stays valid when the file is
    closed, renamed or replaced, but not when it is cut short by someone else.
    """

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._size = os.fstat(handle.fileno()).st_size
        self._map: mmap.mmap | None = None
        self._may_map = self._size >= MAPPED_FROM_BYTES and hasattr(mmap, "MAP_PRIVATE")

    @property
    def is_mapped(self) -> bool:
        """Whether tensors given from now on share the file's own pages."""
        return self._may_map

    def keep_in_memory(self) -> None:
        """Give copies from now on: for tensors that outlive the use case, or are written to."""
        self._may_map = False

    def take(self, start: int, length: int, what: str) -> torch.Tensor:
        """Return ``length`` bytes from ``start`` on; ``what`` names them in an error.

        Raises:
            DamagedFileError: the file ends before that.
        """
        import torch

        if start + length > self._size:
            raise DamagedFileError(f"{what} ends after {max(self._size - start, 0)} of {length} bytes")
        # A view of wider elements has to start where they may start.
        if length and self._may_map and start % 8 == 0:
            return torch.frombuffer(self._mapped(), dtype=torch.uint8, count=length, offset=start)
        raw = torch.empty(length, dtype=torch.uint8)
        if length:
            fill_from(self._handle, start, raw.numpy().data, what)
        return raw

    def release(self) -> None:
        """Let go of the memory that mapped pages take; they are read again when they are used again.

        What was written to a view since is lost.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self._map = mmap.mmap(self._handle.fileno(), self._size, flags=flags, prot=access)
        return self._map
