"""How memory is taken is the process's affair: only one that is ours is changed."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from repconv_cli import allocation


def test_a_model_changes_nothing_in_a_process_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(allocation, "_chosen", [])
    monkeypatch.setattr(allocation, "_return_blocks_of", lambda size: asked.append(size) or True)
    allocation.suit_model(100 << 20)
    assert asked == []
    allocation.return_large_blocks()
    for weights in (1 << 20, 64 << 20, 10 << 30):
        allocation.suit_model(weights)
    assert asked == [8 << 20, 256 << 10, 2 << 20, 8 << 20]


SIDE = 2048


def large(fill: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return allocation.empty((SIDE, SIDE), dtype).fill_(fill)


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    with allocation.large_blocks_again():
        first, second = large(1), large(2)
        places = {first.data_ptr(), second.data_ptr()}
        assert len(places) == 2
        del first
        again = large(3, torch.float16)
        assert again.data_ptr() in places
        assert bool((second == 2).all())
        assert again.shape == (SIDE, SIDE)


def test_memory_that_is_still_looked_at_is_not_used_again() -> None:
    with allocation.large_blocks_again():
        first = large(1)
        seen = memoryview(first.view(torch.uint8).reshape(-1).numpy().data)
        row = large(2)[5]
        del first
        others = [large(3), large(4)]
        assert seen[:4] == struct.pack("<f", 1)
        assert bool((row == 2).all())
        assert [float(other[0, 0]) for other in others] == [3, 4]


def test_a_larger_tensor_takes_memory_of_its_own() -> None:
    with allocation.large_blocks_again():
        first = large(1)
        del first
        wide = allocation.empty((2 * SIDE, SIDE), torch.float32).fill_(2)
        assert wide.numel() == 2 * SIDE * SIDE
        assert bool((wide == 2).all())


def test_nothing_is_kept_outside() -> None:
    with allocation.large_blocks_again():
        kept = large(1)
    assert bool((kept == 1).all())
    assert allocation._free.get() is None
    other = large(2)
    assert bool((kept == 1).all())
    assert bool((other == 2).all())
