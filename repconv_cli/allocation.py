"""How the process takes memory for large tensors."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE = 2 << 20


def return_large_blocks() -> bool:
    """Let glibc give every block of two mebibytes or more back to the system when it is freed; return whether it will.

    By itself it keeps blocks of up to 32 MiB for later. Here one float64 kernel comes after the other, each of another
    size than the last, and what is kept fits none of them: the peak was up to half as high again.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))
    except (AttributeError, OSError):
        # Another C library, such as musl, which returns large blocks anyway.
        return False
