"""A large weight taken some output channels at a time, so that its float64 copy is never there as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# One megabyte of float64: a slab stays in the caches from its cast to its use.
SLAB_VALUES = 1 << 17


@dataclass(frozen=True, eq=False)
class LazyWeight:
    """A float64 weight that is computed where it is read, some output channels at a time; it takes no memory.

    ``rows`` gives a new tensor: the output channels of a slice.

    >>> weight = LazyWeight((4, 2), lambda place: torch.ones(4, 2, dtype=torch.float64)[place])
    >>> weight[1:3].tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """

    shape: tuple[int, ...]
    rows: Callable[[slice], Tensor]
    dtype = torch.float64

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: slice) -> Tensor:
        return self.rows(place)

    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def casting(self, cast: Tensor) -> LazyWeight:
        """Return the same weight; what is read of it is written to ``cast``, whose other values become NaN.

        So what is wanted in another type needs not be computed once more.
        """
        cast.fill_(float("nan"))

        def rows(place: slice) -> Tensor:
            part = self.rows(place)
            cast[place] = part
            return part

        return LazyWeight(self.shape, rows)


Weight = Tensor | LazyWeight


def is_large(weight: Weight | torch.Size) -> bool:
    """Whether a tensor, or one of this shape, is better not cast as a whole."""
    return weight.numel() > 2 * SLAB_VALUES


def slabs(weight: Weight, fewest_rows: int = 1, *, channels_last: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield the places of some output channels after the other, and their weight in float64.

    A slab is for one turn of the loop: the next one may be in the same memory. Where ``weight`` has another type or is
    lazy, and with ``channels_last``, which lays out two-dimensional kernels anew, it may be written to.

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
