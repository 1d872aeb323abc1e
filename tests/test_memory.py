"""Memory is used again where nothing can see it any more, and only there."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from repconv_cli import memory

SIDE = 2048


def large(fill: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return memory.empty((SIDE, SIDE), dtype).fill_(fill)


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    with memory.large_blocks_again():
        first, second = large(1), large(2)
        places = {first.data_ptr(), second.data_ptr()}
        assert len(places) == 2
        del first
        again = large(3, torch.float16)
        assert again.data_ptr() in places
        assert bool((second == 2).all())
        assert again.shape == (SIDE, SIDE)


def test_memory_that_is_still_looked_at_is_not_used_again() -> None:
    with memory.large_blocks_again():
        first = large(1)
        seen = memoryview(first.view(torch.uint8).reshape(-1).numpy().data)
        row = large(2)[5]
        del first
        others = [large(3), large(4)]
        assert seen[:4] == struct.pack("<f", 1)
        assert bool((row == 2).all())
        assert [float(other[0, 0]) for other in others] == [3, 4]


def test_a_larger_tensor_takes_memory_of_its_own() -> None:
    with memory.large_blocks_again():
        first = large(1)
        del first
        wide = memory.empty((2 * SIDE, SIDE), torch.float32).fill_(2)
        assert wide.numel() == 2 * SIDE * SIDE
        assert bool((wide == 2).all())


def test_nothing_is_kept_outside() -> None:
    with memory.large_blocks_again():
        kept = large(1)
    assert bool((kept == 1).all())
    assert memory._free.get() is None
    other = large(2)
    assert bool((kept == 1).all())
    assert bool((other == 2).all())
