"""Memory of large tensors, used again by the next ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repconv_cli.allocation import LARGE_BYTES

_free: ContextVar[list[NDArray[Any]] | None] = ContextVar("free", default=None)


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
    size, free = prod(shape) * dtype.itemsize, _free.get()
    if free is None or size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    fitting = next((index for index, block in enumerate(free) if block.nbytes >= size), None)
    if fitting is None:
        # Of those that are too small none is kept, so that there are no more than are in use at once.
        free.clear()
        block = np.empty(size, dtype=np.uint8)
    else:
        block = free.pop(fitting)
    lent = block[:size]
    # The tensor's storage holds this view, and so does whatever else is made of it.
    weakref.finalize(lent, free.append, block).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)
