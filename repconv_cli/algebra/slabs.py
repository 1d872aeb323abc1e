"""A large weight taken some output channels at a time, so that its float64 copy is never there as a whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# One megabyte of float64: a slab stays in the caches from its cast to its use.
SLAB_VALUES = 1 << 17


def is_large(weight: Tensor) -> bool:
    """Whether a tensor is better not cast as a whole."""
    return weight.numel() > 2 * SLAB_VALUES


def slabs(weight: Tensor, fewest_rows: int = 1, *, channels_last: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield the places of some output channels after the other, and their weight in float64.

    A slab is for one turn of the loop: the next one may be in the same memory. Where ``weight`` has another type, and
    with ``channels_last``, which lays out two-dimensional kernels anew, it is a copy, which may be written to.

    >>> [(place.start, part.dtype) for place, part in slabs(torch.zeros(3, 1 << 17))]
    [(0, torch.float64), (1, torch.float64), (2, torch.float64)]
    """
    rows = min(len(weight), max(fewest_rows, SLAB_VALUES * len(weight) // max(1, weight.numel())))
    buffer = None
    if channels_last or weight.dtype != torch.float64:
        # One for all: memory that goes and comes back for each slab costs more than the cast.
        layout = torch.channels_last if channels_last else torch.contiguous_format
        buffer = torch.empty((rows, *weight.shape[1:]), dtype=torch.float64, memory_format=layout)
    for start in range(0, len(weight), rows):
        place = slice(start, start + rows)
        part = weight[place]
        yield place, part if buffer is None else buffer[: len(part)].copy_(part)
