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

    ``write`` writes the output channels of a slice to a tensor of their shape.

    >>> weight = LazyWeight((4, 2), lambda place, out: out.fill_(place.start))
    >>> [part.tolist() for _, part in slabs(weight, fewest_rows=4)]
    [[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]
    """

    shape: tuple[int, ...]
    write: Callable[[slice, Tensor], object]
    dtype = torch.float64

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def casting(self, cast: Tensor) -> LazyWeight:
        """Return the same weight; what is read of it is written to ``cast`` too, whose other values become NaN.

        So what is wanted in another type needs not be computed once more.
        """
        cast.fill_(float("nan"))

        def write(place: slice, out: Tensor) -> None:
            self.write(place, out)
            cast[place] = out

        return LazyWeight(self.shape, write)


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
    all_places = slab_places(weight, fewest_rows)
    if isinstance(weight, Tensor) and weight.dtype == torch.float64 and not channels_last:
        yield from ((place, weight[place]) for place in all_places)
        return
    write = weight.write if isinstance(weight, LazyWeight) else lambda place, out: out.copy_(weight[place])
    # One for all: memory that goes and comes back for each slab costs more than the cast.
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (all_places[0].stop if all_places else 0, *weight.shape[1:])
    buffer = torch.empty(shape, dtype=torch.float64, memory_format=layout)
    for place in all_places:
        part = buffer[: place.stop - place.start]
        write(place, part)
        yield place, part


def slab_places(weight: Weight, fewest_rows: int = 1) -> list[slice]:
    """Return the places of the :func:`slabs` alone."""
    rows = max(1, fewest_rows, SLAB_VALUES * len(weight) // max(1, weight.numel()))
    return [slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]
