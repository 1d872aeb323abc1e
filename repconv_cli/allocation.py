"""How the process takes memory for large tensors."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_MOST = 8 << 20
_LEAST = 256 << 10
_PART = 32
_chosen: list[bool] = []
_free: ContextVar[list[numpy.ndarray] | None] = ContextVar("free", default=None)


def return_large_blocks() -> bool:
    """Let glibc give blocks of eight mebibytes or more back to the system when freed; return whether it will.

    By itself it keeps blocks of up to 32 MiB for later. Here one float64 kernel comes after the other, each of another
    size than the last, and what is kept fits none of them: the peak was up to half as high again. Of smaller blocks
    half as much is kept, so that a kernel worked on piece by piece does not take each piece anew.
    """
    # Such a block comes back as pages of 2 MiB where the system has them: one fault instead of 512. Torch looks at this
    # when it first takes memory.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _chosen[:] = [_return_blocks_of(_MOST)]
    return _chosen[0]


def suit_model(weight_bytes: int) -> None:
    """Let what is kept be a small part of a model's weights, in a process that returns large blocks; else nothing.

    Not less than needed: each page that comes back has to be cleared by the system first, which takes its time.
    """
    if any(_chosen):
        _return_blocks_of(min(max(weight_bytes // _PART, _LEAST), _MOST))


@contextmanager
def large_blocks_again() -> Iterator[None]:
    """Let :func:`empty` use the memory of a large tensor again, once nothing refers to that, until this is left.

    The system clears each page that it gives: for tensors that come and go one after the other, that takes longer than
    what is done with them.
    """
    token = _free.set([])
    try:
        yield
    finally:
        _free.reset(token)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor, as ``torch.empty`` does, see :func:`large_blocks_again`."""
    import numpy
    import torch

    size, free = prod(shape) * dtype.itemsize, _free.get()
    if free is None or size < _MOST:
        return torch.empty(shape, dtype=dtype)
    fitting = next((index for index, block in enumerate(free) if block.nbytes >= size), None)
    if fitting is None:
        # Of those that are too small none is kept, so that there are no more than are in use at once.
        free.clear()
        block = numpy.empty(size, dtype=numpy.uint8)
    else:
        block = free.pop(fitting)
    lent = block[:size]
    # The tensor's storage holds this view, and so does whatever else is made of it.
    weakref.finalize(lent, free.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _return_blocks_of(size: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        return bool(library.mallopt(_M_MMAP_THRESHOLD, size) and library.mallopt(_M_TRIM_THRESHOLD, size // 2))
    except (AttributeError, OSError):
        # Another C library, such as musl, which returns large blocks anyway.
        return False
