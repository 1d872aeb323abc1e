"""A large weight taken some output channels at a time, so that its float64 copy is never there as a whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# One megabyte of float64: a slab stays in the caches from its cast to its use.
SLAB_VALUES = 1 << 17


def is_large(weight: Tensor) -> bool:
    """Whether a tensor is better not cast as a whole."""
    return weight.numel() > 2 * SLAB_VALUES


def slabs(weight: Tensor, fewest_rows: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Yield the places of some output channels after the other, and their weight in float64, not to be written to.

    >>> import torch
    >>> [(place.start, part.dtype) for place, part in slabs(torch.zeros(3, 1 << 17))]
    [(0, torch.float64), (1, torch.float64), (2, torch.float64)]
    """
    rows = max(fewest_rows, SLAB_VALUES * len(weight) // max(1, weight.numel()))
    for start in range(0, len(weight), rows):
        place = slice(start, start + rows)
        yield place, weight[place].double()
