"""Slabs of a weight are the weight, and writing to those that are copies leaves it as it was."""

from __future__ import annotations

import pytest
import torch

from repconv_cli.algebra.operations import scaled
from repconv_cli.algebra.slabs import LazyWeight, slabs

TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(7, 5), (7, 5, 3), (7, 5, 3, 2), (3, 4, 2, 2, 2), (1, 5, 3, 3)]


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 40)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fewest", [1, 3, 100])
def test_slabs_joined_are_the_weight(dtype: torch.dtype, shape: tuple[int, ...], fewest: int) -> None:
    weight = torch.randn(shape).to(dtype)
    for channels_last in (False, True) if len(shape) == 4 else (False,):
        joined = torch.full(shape, torch.nan, dtype=torch.float64)
        for place, part in slabs(weight, fewest, channels_last=channels_last):
            assert not channels_last or part.is_contiguous(memory_format=torch.channels_last)
            joined[place] = part
        assert torch.equal(joined, weight.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_copy_may_be_written_to(dtype: torch.dtype, channels_last: bool) -> None:
    weight = torch.randn(7, 5, 3, 2).to(dtype)
    before = weight.clone()
    for _, part in slabs(weight, channels_last=channels_last):
        if channels_last or dtype != torch.float64:
            part.abs_().add_(1.0)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scaled_weight_is_a_new_one(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, scale = torch.randn(shape).to(dtype), torch.randn(shape[0], dtype=torch.float64)
    before = weight.clone()
    column = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    assert torch.equal(scaled(weight, scale), weight.double() * column)
    scaled(weight).zero_()
    assert torch.equal(weight, before)


def test_what_was_not_read_of_a_weight_is_not_taken_for_a_number() -> None:
    whole = torch.randn(6, 3, dtype=torch.float64)
    cast = torch.zeros(6, 3)
    lazy = LazyWeight((6, 3), lambda place, out: out.copy_(whole[place])).casting(cast)
    assert bool(cast.isnan().all())
    out = torch.empty(2, 3, dtype=torch.float64)
    lazy.write(slice(1, 3), out)
    assert torch.equal(out, whole[1:3])
    assert torch.equal(cast[1:3], whole[1:3].float())
    assert bool(cast[[0, 3, 4, 5]].isnan().all())
    assert torch.equal(torch.cat([part.clone() for _, part in slabs(lazy)]), whole)
    assert torch.equal(cast, whole.float())


@pytest.mark.parametrize("shape", SHAPES)
def test_slabs_of_a_weight_that_is_computed_are_the_weight(shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, dtype=torch.float64)
    lazy = LazyWeight(shape, lambda place, out: out.copy_(whole[place]))
    for channels_last in (False, True) if len(shape) == 4 else (False,):
        found = [part.clone() for _, part in slabs(lazy, channels_last=channels_last)]
        assert torch.equal(torch.cat(found), whole)
