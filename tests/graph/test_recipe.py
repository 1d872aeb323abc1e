"""Sums of kernels: one accumulation gives what adding and scaling one after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repconv_cli.algebra import ConvMap, Geometry, Kernel, compose, conv_map, fold, identity, merge
from repconv_cli.algebra.operations import add_onto
from repconv_cli.algebra.slabs import slabs
from repconv_cli.graph.recipe import Recipe, Sum, compute, compute_lazily

CHANNELS = 4


def random_map(kernel: int, groups: int = 1) -> ConvMap:
    weight = torch.randn(CHANNELS, CHANNELS // groups, kernel, kernel, dtype=torch.float64)
    return conv_map(weight, padding=kernel // 2, groups=groups)


def given(found: ConvMap, calls: list[int] | None = None) -> Recipe:
    def make(_: list[ConvMap]) -> ConvMap:
        if calls is not None:
            calls.append(1)
        return found

    return Recipe(make)


def factors() -> Tensor:
    return torch.randn(CHANNELS, dtype=torch.float64)


@pytest.fixture
def geometry() -> Geometry:
    return random_map(5).geometry


def test_a_sum_is_what_merging_and_folding_give(geometry: Geometry) -> None:
    large, small, same, grouped = random_map(5), random_map(1), identity(CHANNELS), random_map(3, groups=2)
    a, b, c = factors(), factors(), factors()
    inner = Sum(geometry, ((a, given(small)), (None, given(same)), (b, given(grouped))))
    found = compute(Sum(geometry, ((None, given(large)), (c, inner))))
    expected = merge(large, fold(merge(merge(fold(small, a), same), fold(grouped, b)), c))
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-14, atol=1e-14)
    assert found.geometry == expected.geometry


def test_a_sum_that_two_read_is_computed_once_and_stays_what_it_is(geometry: Geometry) -> None:
    large, small, scale = random_map(5), random_map(1), factors()
    calls: list[int] = []
    shared = Sum(geometry, ((None, given(large, calls)), (None, given(small, calls))))
    squared: Callable[[list[ConvMap]], ConvMap] = lambda maps: fold(maps[0], maps[0].weight.flatten(1).sum(1))  # noqa: E731
    found = compute(Sum(geometry, ((scale, shared), (None, Recipe(squared, (shared,))))))
    both = merge(large, small)
    expected = both.weight * (scale + both.weight.flatten(1).sum(1)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found.weight, expected, rtol=1e-13, atol=1e-13)
    assert len(calls) == 2


def test_no_part_is_written_to(geometry: Geometry) -> None:
    parts = [random_map(5), random_map(5)]
    before = [part.weight.clone() for part in parts]
    compute(Sum(geometry, tuple((factors(), given(part)) for part in parts)))
    assert all(torch.equal(part.weight, old) for part, old in zip(parts, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_stored_kernel_is_added_in_float64(dtype: torch.dtype, geometry: Geometry) -> None:
    stored, scale = torch.randn(CHANNELS, CHANNELS, 3, 3).to(dtype), factors()
    own = random_map(3).geometry

    def refuse(_: list[ConvMap]) -> ConvMap:
        raise AssertionError("a stored kernel is not made")

    part = Recipe(refuse, stored=(lambda: stored, own))
    found = compute(Sum(geometry, ((scale, part), (None, part))))
    expected = stored.double() * (scale + 1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found.weight[:, :, 1:4, 1:4], expected, rtol=1e-14, atol=1e-14)
    assert float(found.weight.abs().sum()) == pytest.approx(float(expected.abs().sum()))


def test_rows_are_added_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, geometry: Geometry) -> None:
    part, scale = random_map(3), factors()
    totals = []
    for values in (1, 3 * CHANNELS * 9, 1 << 18):
        monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", values)
        total = torch.zeros(geometry.weight_shape, dtype=torch.float64)
        add_onto(total, geometry, part.weight, part.geometry, scale)
        totals.append(total)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


def test_a_long_sum_needs_no_recursion() -> None:
    one = random_map(1)
    total: Recipe | Sum = given(one)
    for _ in range(3000):
        total = Sum(one.geometry, ((None, total), (None, given(one))))
    torch.testing.assert_close(compute(total).weight, 3001 * one.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [1, 1 << 18])
def test_a_stored_kernel_composes_as_its_float64_copy(
    dtype: torch.dtype, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", values)
    for outer, inner in ((random_map(3), random_map(1)), (random_map(1), random_map(3))):
        inner = ConvMap(inner.weight, factors(), inner.geometry)
        unpadded = tuple(replace(axis, low=0, high=0) for axis in outer.geometry.axes)
        stored = Kernel(outer.weight.to(dtype), replace(outer.geometry, axes=unpadded))
        copy = ConvMap(stored.weight.double(), stored.bias, stored.geometry)
        found, expected = compose(stored, inner), compose(copy, inner)
        assert found.weight.dtype == found.bias.dtype == torch.float64
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-13, atol=1e-13)
        x = torch.randn(1, CHANNELS, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(found(x), copy(inner(x)), rtol=1e-12, atol=1e-12)


def stored(found: ConvMap, dtype: torch.dtype) -> Recipe:
    weight = found.weight.to(dtype)
    return Recipe(lambda _: ConvMap(weight.double(), found.bias, found.geometry), (), (lambda: weight, found.geometry))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [1, 2 * CHANNELS * 25])
def test_what_is_computed_where_it_is_read_has_the_same_bits(
    dtype: torch.dtype, values: int, monkeypatch: pytest.MonkeyPatch, geometry: Geometry
) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 1)
    large, small, grouped = (stored(m, dtype) for m in (random_map(5), random_map(1), random_map(3, groups=2)))
    biased = given(ConvMap(random_map(3).weight, factors(), random_map(3).geometry))
    inner = Sum(geometry, ((factors(), small), (None, given(identity(CHANNELS))), (factors(), grouped)))
    total = Sum(geometry, ((factors(), inner), (factors(), large), (factors(), biased)))
    expected, found = compute(total), compute_lazily(total)
    assert found is not None
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", values)
    weight, bias = found
    whole = torch.full_like(expected.weight, torch.nan)
    weight.write(slice(0, len(weight)), whole)
    assert torch.equal(whole, expected.weight)
    assert torch.equal(torch.cat([part.clone() for _, part in slabs(weight)]), expected.weight)
    assert torch.equal(bias, expected.bias)


def test_a_kernel_computed_from_others_is_made_whole(monkeypatch: pytest.MonkeyPatch, geometry: Geometry) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 1)
    large = stored(random_map(5), torch.float32)
    composed = Recipe(lambda maps: compose(random_map(1), maps[0]), (large,))
    assert compute_lazily(Sum(geometry, ((None, large), (None, composed)))) is None
    assert compute_lazily(Sum(geometry, ((None, composed),))) is None
    assert compute_lazily(Sum(geometry, ((None, stored(random_map(3), torch.float32)),))) is None
    assert compute_lazily(Sum(geometry, ((None, large),))) is not None


def test_a_small_kernel_is_made_whole(geometry: Geometry) -> None:
    assert compute_lazily(Sum(geometry, ((None, stored(random_map(5), torch.float32)),))) is None
