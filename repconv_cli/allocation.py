"""How the process takes memory for large tensors, and gives it back."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from mmap import PAGESIZE

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
LARGE_BYTES = 8 << 20
"""From here on a block that is freed goes back to the system."""

_LEAST = 256 << 10
_PART = 32
_GROWTH = 8


@dataclass
class _Heap:
    """The heap of glibc, in a process that returns large blocks."""

    library: ctypes.CDLL
    growth: int = sys.maxsize
    resident: int = 0

    def return_blocks_of(self, size: int) -> bool:
        """Have blocks from this size on returned when they are freed, and half as much at the heap's end."""
        set_option = self.library.mallopt
        return bool(set_option(_M_MMAP_THRESHOLD, size) and set_option(_M_TRIM_THRESHOLD, size // 2))

    def return_holes(self) -> None:
        """Return the pages between blocks in use, if the process has grown since that was last done."""
        # Where the system does not tell, such as without /proc, nothing is lost but memory.
        with suppress(OSError):
            now = _resident()
            if now > self.resident + self.growth:
                self.library.malloc_trim(0)
                self.resident = _resident()
            else:
                self.resident = min(now, self.resident)


_heap: list[_Heap] = []


def return_large_blocks() -> bool:
    """Let glibc give blocks of eight mebibytes or more back to the system when freed; return whether it will.

    By itself it keeps blocks of up to 32 MiB for later. Here one float64 kernel comes after the other, each of another
    size than the last, and what is kept fits none of them: the peak was up to half as high again. Of smaller blocks
    half as much is kept, so that a kernel worked on piece by piece does not take each piece anew.
    """
    # Such a block comes back as pages of 2 MiB where the system has them: one fault instead of 512. Torch looks at this
    # when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    heap = _find_heap()
    _heap[:] = [heap] if heap is not None and heap.return_blocks_of(LARGE_BYTES) else []
    return bool(_heap)


def suit_model(weight_bytes: int) -> None:
    """Let what is kept be a small part of a model's weights, in a process that returns large blocks; else nothing.

    Not less than needed: each page that comes back has to be cleared by the system first, which takes its time.
    """
    for heap in _heap:
        heap.return_blocks_of(min(max(weight_bytes // _PART, _LEAST), LARGE_BYTES))
        heap.growth = max(weight_bytes // _GROWTH, _LEAST)
        heap.resident = 0


def return_holes() -> None:
    """Give back what lies free between blocks in use, once the process has grown by a part of the model's weights.

    glibc itself gives back the end of its heap alone. What the many small tensors of a net leave between the graph's
    nodes was more than half of the peak of some small models. Does nothing before a model is known, as when weights
    alone are folded piece by piece in the same memory, nor in a process of somebody else.
    """
    for heap in _heap:
        heap.return_holes()


def _resident() -> int:
    """Return the resident memory of this process in bytes."""
    # Asked before each operator: a file object would take twice as long.
    file = os.open("/proc/self/statm", os.O_RDONLY)
    try:
        return int(os.read(file, 128).split()[1]) * PAGESIZE
    finally:
        os.close(file)


def _find_heap() -> _Heap | None:
    """Return glibc's heap; None with another C library, such as musl, which returns large blocks anyway."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim  # noqa: B018 - looked up now, not at the first use
    except (AttributeError, OSError):
        return None
    return _Heap(library)
