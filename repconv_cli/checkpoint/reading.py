"""Reading an exact run of bytes from an open file."""

from __future__ import annotations

from typing import BinaryIO

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
