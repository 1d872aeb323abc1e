"""How the process takes memory for large tensors."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_LARGE = 8 << 20
_KEPT = 4 << 20


def return_large_blocks() -> bool:
    """Let glibc give blocks of eight mebibytes or more back to the system when freed; return whether it will.

    By itself it keeps blocks of up to 32 MiB for later. Here one float64 kernel comes after the other, each of another
    size than the last, and what is kept fits none of them: the peak was up to half as high again. Of smaller blocks it
    keeps up to 4 MiB, so that a kernel worked on piece by piece does not take each piece anew.
    """
    if not sys.platform.startswith("linux"):
        return False
    # Such a block comes back as pages of 2 MiB where the system has them: one fault instead of 512. Torch looks at this
    # when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, _LARGE) and library.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    except (AttributeError, OSError):
        # Another C library, such as musl, which returns large blocks anyway.
        return False
