"""How the process takes memory for large tensors."""

from __future__ import annotations

import ctypes
import os
import sys

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
LARGE_BYTES = 8 << 20
"""From here on a block that is freed goes back to the system."""

_LEAST = 256 << 10
_PART = 32
_chosen: list[bool] = []


def return_large_blocks() -> bool:
    """Let glibc give blocks of eight mebibytes or more back to the system when freed; return whether it will.

    By itself it keeps blocks of up to 32 MiB for later. Here one float64 kernel comes after the other, each of another
    size than the last, and what is kept fits none of them: the peak was up to half as high again. Of smaller blocks
    half as much is kept, so that a kernel worked on piece by piece does not take each piece anew.
    """
    # Such a block comes back as pages of 2 MiB where the system has them: one fault instead of 512. Torch looks at this
    # when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _chosen[:] = [_return_blocks_of(LARGE_BYTES)]
    return _chosen[0]


def suit_model(weight_bytes: int) -> None:
    """Let what is kept be a small part of a model's weights, in a process that returns large blocks; else nothing.

    Not less than needed: each page that comes back has to be cleared by the system first, which takes its time.
    """
    if any(_chosen):
        _return_blocks_of(min(max(weight_bytes // _PART, _LEAST), LARGE_BYTES))


def _return_blocks_of(size: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, size) and library.mallopt(_M_TRIM_THRESHOLD, size // 2))
    except (AttributeError, OSError):
        # Another C library, such as musl, which returns large blocks anyway.
        return False
