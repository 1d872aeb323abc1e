"""A size that is told to be free is: no number that is made of one is taken for what it was at the example."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import repconv_cli
from repconv_cli.errors import InputError
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.sizes import other_sizes
from repconv_cli.graph.trace import trace
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise

SQUARE = (2, 4, 8, 8)


@dataclass(frozen=True)
class Sized:
    """A forward with two convolutions between which something depends on a size, and a shape at which it shows."""

    name: str
    function: Callable[[Any, Tensor], Tensor]
    other: tuple[int, ...]
    shape: tuple[int, ...] = SQUARE

    def make(self) -> nn.Module:
        return randomised(
            Formula(lambda p, x: p.b(self.function(p.a(x), x).expand(-1, 4, -1, -1)), a=conv(4, 4), b=conv(4, 4, 1))
        )


def pooled(y: Tensor) -> Tensor:
    """Return a map of few sizes: several of the input's give one of its own."""
    return functional.max_pool2d(y, 8)


def count(y: Tensor) -> int:
    return y.shape[2] * y.shape[3]


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[3])


WIDE, HIGH, LONG = (2, 4, 8, 16), (2, 4, 16, 8), (2, 4, 8, 100)
SIZED = [
    Sized(
        "a_sum_by_its_count",
        lambda y, x: pooled(y).sum((2, 3), True) / count(pooled(y)),
        (2, 4, 16, 40),
        (2, 4, 16, 24),
    ),
    Sized(
        "a_mean_and_a_shift",
        lambda y, x: pooled(y).mean((2, 3), True) + 0.1 * (x.shape[3] // 8),
        (2, 4, 32, 16),
        (2, 4, 32, 40),
    ),
    Sized("a_larger_factor_from_64_on", lambda y, x: y * (x.shape[3] // 64 + 1), LONG),
    Sized("a_larger_batch", lambda y, x: pooled(y) * (x.shape[0] // 8 + 1), (9, 4, 32, 24), (2, 4, 32, 24)),
    Sized("a_logarithm_from_64_on", lambda y, x: y * ((positions(x) + 1).log() / 4.16).clamp(min=1), LONG),
    Sized("the_first_64", lambda y, x: y * (positions(x) < 64), LONG),
    Sized("segments_of_64", lambda y, x: y + torch.tensor([0.0, 1, 2])[positions(x) // 64], LONG),
    Sized("a_band_of_64", lambda y, x: y * ((positions(x)[:, None] - positions(x)).abs() < 64).sum(0), LONG),
    Sized("ones_by_hundreds", lambda y, x: y + torch.ones(x.shape[3]) * (x.shape[3] // 100), LONG),
    Sized("full_of_a_size", lambda y, x: y * torch.full((4, 1, 1), 1 + x.shape[3] // 64), LONG),
    Sized("new_and_full_of_a_size", lambda y, x: y * x.new_full((4, 1, 1), x.shape[3] // 64 + 1), LONG),
    Sized("like_one_and_full_of_a_size", lambda y, x: y * torch.full_like(y, x.shape[3] // 64 + 1), LONG),
    Sized("a_tensor_of_a_size", lambda y, x: y * torch.scalar_tensor(1 + x.shape[3] // 64), LONG),
    Sized("a_few_bins", lambda y, x: functional.adaptive_avg_pool2d(y, 4) * (1 + x.shape[3] // 64), LONG),
    Sized("a_sum_of_ones", lambda y, x: y * torch.ones(x.shape[3]).sum().clamp(min=64), LONG),
    Sized("alpha_is_a_size", lambda y, x: torch.add(y, x, alpha=x.shape[3] // 64), LONG),
    Sized("copies_for_each_64", lambda y, x: y.repeat(1, 1, 1, 1 + x.shape[3] // 64), LONG),
    Sized("a_ratio", lambda y, x: y * (x.shape[2] / x.shape[3]), WIDE),
    Sized("padded_to_a_square", lambda y, x: functional.pad(y, (0, 0, 0, max(0, x.shape[3] - x.shape[2]))), WIDE),
    Sized("padded_to_the_other_square", lambda y, x: functional.pad(y, (0, max(0, x.shape[2] - x.shape[3]))), HIGH),
    Sized("sizes_exchanged", lambda y, x: y.flatten(2).reshape(x.shape[0], 4, x.shape[3], x.shape[2]), WIDE),
    Sized("resized_to_the_other", lambda y, x: functional.interpolate(y, size=(x.shape[3], x.shape[2])), WIDE),
    Sized("rolled_by_a_difference", lambda y, x: torch.roll(y, x.shape[2] - x.shape[3], 2), WIDE),
    Sized("rows_by_the_width", lambda y, x: y[:, :, torch.arange(x.shape[3])], HIGH),
    Sized("at_most_its_size_here", lambda y, x: y * min(x.shape[2], 8), (2, 4, 4, 4)),
    Sized("a_band_as_wide_as_here", lambda y, x: y * torch.ones(x.shape[2], x.shape[3]).tril(20), (2, 4, 32, 32)),
    Sized("by_the_batch", lambda y, x: y * ((x.shape[0] + 1) // 2), (5, 4, 8, 8), (3, 4, 8, 8)),
    Sized("over_the_batch", lambda y, x: y / x.shape[0], (5, 4, 8, 8)),
    Sized("batch_times_height", lambda y, x: y * (x.shape[0] * x.shape[2]), (3, 4, 9, 8)),
    Sized("a_constant_of_the_height", lambda y, x: y + torch.full((4, 1, 1), x.shape[2]), HIGH),
    Sized(
        "another_factor_for_each_sample",
        lambda y, x: y * (torch.arange(x.shape[0]) // 2 + 1).view(-1, 1, 1, 1),
        (7, 4, 8, 8),
        (4, 4, 8, 8),
    ),
]


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.name)
def test_what_depends_on_a_size_does_so_after_fusing(case: Sized) -> None:
    module = case.make()
    program = fused(module, noise(case.shape), is_spatial_free=True).program
    assert program.inputs[0].shape == (None, 4, None, None)
    for shape in (case.shape, case.other):
        assert difference(module, program, noise(shape, seed=1)) <= TOLERANCE


@pytest.mark.parametrize("by", [count, lambda y: y.shape[2], lambda y: 1 + y.shape[0] // 3])
def test_a_sum_over_a_number_of_sizes_before_a_layer(by: Callable[[Tensor], int]) -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        y = pooled(part.a(x).relu())
        return part.head(y.sum((2, 3)) / by(y))  # type: ignore[no-any-return]

    module = randomised(Formula(forward, a=conv(4, 4), head=nn.Linear(4, 3)))
    program = fused(module, noise((2, 4, 32, 24)), is_spatial_free=True).program
    assert program.inputs[0].shape == (None, 4, None, None)
    for shape in ((2, 4, 32, 24), (7, 4, 40, 24), (3, 4, 64, 64)):
        assert difference(module, program, noise(shape, seed=1)) <= TOLERANCE


NEUTRAL = [
    Sized("zeros_of_its_size", lambda y, x: y + torch.zeros(x.shape[0], 4, x.shape[2], x.shape[3]), WIDE),
    Sized("one_value_spread", lambda y, x: y * torch.full((x.shape[2], x.shape[3]), 3.0), WIDE),
    Sized("there_and_back", lambda y, x: y.flatten(2).reshape(x.shape), WIDE),
]


@pytest.mark.parametrize("case", NEUTRAL, ids=lambda case: case.name)
def test_what_is_the_same_at_all_sizes_is_fused(case: Sized) -> None:
    module = case.make()
    found = fused(module, noise(case.shape), is_spatial_free=True)
    assert len(found.plan.blocks) == 1
    assert difference(module, found.program, noise(case.other, seed=1)) <= TOLERANCE


def test_other_sizes_are_smaller_and_larger_and_no_two_axes_alike() -> None:
    program = trace(conv(4, 4), noise(SQUARE))
    (x,) = program.placeholders()
    shapes = [sizes.shapes[x] for sizes in other_sizes(program)]
    batch, height, width = ([shape[axis] for shape in shapes] for axis in (0, 2, 3))
    assert max(batch) > 2
    for sizes in (height, width):
        assert min(sizes) < 8 < max(sizes)
        for stride in (2, 3, 4):
            assert {size % stride for size in (8, *sizes)} == set(range(stride))
    ratios = [h / w for h, w in zip(height, width, strict=True)]
    assert min(ratios) < 1 < max(ratios)


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 4, 9), (2, 3, 9, 9, 9), (2, 3, 5, 6, 7, 4)])
def test_other_sizes_of_inputs_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    program = trace(nn.Sequential(nn.ReLU()), noise(shape))
    (x,) = program.placeholders()
    found = [sizes.shapes[x] for sizes in other_sizes(program)]
    assert len(found) == 4
    if len(set(shape[-2:])) == 1:
        assert all(sizes[-1] != sizes[-2] for sizes in found)


KINDS: list[tuple[Callable[[Any, Tensor], Tensor], Tensor, Tensor, str]] = [
    (lambda p, x: p.a(x[None] if x.ndim == 3 else x).softmax(1), noise(SQUARE)[0], noise(SQUARE[1:])[0], "3 axes"),
    (lambda p, x: p.a(x / 9 if not x.is_floating_point() else x), torch.arange(512).view(SQUARE), noise(SQUARE)[0], ""),
    (lambda p, x: p.a(x.float()), torch.ones(SQUARE, dtype=torch.bool), torch.arange(512).view(SQUARE), "int64"),
]


@pytest.mark.parametrize(("function", "example", "other", "told"), KINDS)
def test_an_input_of_another_kind_is_refused_when_called(
    function: Callable[[Any, Tensor], Tensor], example: Tensor, other: Tensor, told: str, tmp_path: Path
) -> None:
    module = randomised(Formula(function, a=conv(4, 4)))
    repconv_cli.fuse(module, tmp_path / "out.safetensors", args=(example,))
    model = repconv_cli.load(tmp_path / "out.safetensors")
    with torch.no_grad():
        assert torch.allclose(model(example), module(example), atol=1e-4)
    with pytest.raises(InputError, match=f"input x .*{told}"):
        model(other)


@pytest.mark.parametrize("batches", [(4, 5), (4, 4)])
def test_one_sample_of_one_input_alone_is_looked_at(batches: tuple[int, int], tmp_path: Path) -> None:
    def forward(part: Any, both: tuple[Tensor, Tensor]) -> Tensor:
        x, y = both
        query = part.layer(x) * (3 if x.shape[0] == 1 and y.shape[0] > 1 else 1)
        return query @ part.layer(y).T  # type: ignore[no-any-return]

    module = randomised(Formula(forward, layer=nn.Linear(6, 8)))
    pair = tuple(noise((batch, 6))[0] for batch in batches)
    repconv_cli.fuse(module, tmp_path / "out.safetensors", args=(pair,))
    model = repconv_cli.load(tmp_path / "out.safetensors")
    with torch.no_grad():
        assert torch.allclose(model(pair), module(pair), atol=1e-5)
    with pytest.raises(InputError, match="axis 0 has size 1"):
        model((pair[0][:1], pair[1]))


ONE_SAMPLE: list[Callable[[Tensor], bool]] = [
    lambda x: x.numel() < 3000,
    lambda x: x.shape[0] * x.shape[2] >= 32,
    lambda x: x.shape[0] + x.shape[2] >= 20,
    lambda x: x.shape[0] == 1 and x.shape[2] < 18,
]


@pytest.mark.parametrize("condition", ONE_SAMPLE)
def test_one_small_sample_that_takes_another_way_does_so_after_fusing(
    condition: Callable[[Tensor], bool], tmp_path: Path
) -> None:
    module = randomised(Formula(lambda p, x: p.a(x).relu() * (3 if condition(x) else 1), a=conv(4, 4)))
    repconv_cli.fuse(module, tmp_path / "out.safetensors", input=(2, 4, 30, 30))
    model, accepted = repconv_cli.load(tmp_path / "out.safetensors"), 0
    for shape in itertools.product((1, 2, 5), (4,), range(2, 40, 3), (8, 17, 30)):
        x = noise(shape)[0]
        try:
            found = model(x)
        except InputError:
            continue
        accepted += 1
        assert torch.allclose(found, module(x), atol=1e-4), shape
    # At other batches than one, at the example's size.
    assert accepted


def test_a_number_of_a_fixed_size_is_a_number() -> None:
    module = randomised(Formula(lambda p, x: p.b(p.a(x) / x.shape[2]), a=conv(4, 4), b=conv(4, 4, 1)))
    program = trace(module, noise(SQUARE), may_vary=((True, False, False, False),))
    assert len(make_plan(program).blocks) == 1
    constants = Constants(program)
    assert all(constants.is_same_elsewhere(node) for node in program.graph.nodes if node.op == "get_attr")


def test_tokens_are_free_in_number_but_not_in_channels() -> None:
    program = trace(nn.Linear(4, 4), noise((2, 10, 4)))
    assert program.inputs[0].shape == (None, None, 4)
    assert program.notes == ()


WAYS: list[tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = [
    (lambda p, x: p.a(functional.pad(x, (0, 0, 0, 1)) if x.shape[2] % 2 == 1 else x).relu(), SQUARE, (2, 4, 9, 8)),
    (lambda p, x: p.a(x).relu() * (2 if x.shape[0] % 3 == 0 else 1), SQUARE, (3, 4, 8, 8)),
    (lambda p, x: p.a(x).relu() * (2 if x.shape[2] - x.shape[3] >= 1 else 1), (2, 4, 20, 10), SQUARE),
    (lambda p, x: p.a(x).relu() * (2 if x.shape[2] // 8 != 1 else 1), (2, 4, 20, 10), (2, 4, 9, 9)),
    (lambda p, x: p.a(x).relu() * (2 if 16 // x.shape[2] >= 1 else 1), (2, 4, 10, 10), (2, 4, 32, 32)),
    (lambda p, x: p.a(x).relu() * (2 if x.shape[2] >= 16 else 1), SQUARE, (2, 4, 32, 32)),
    (lambda p, x: p.a(x).relu() * (2 if x.shape[2] == 1 else 1), SQUARE, (2, 4, 1, 8)),
    (lambda p, x: p.a(x).relu().squeeze(3), SQUARE, (2, 4, 8, 1)),
]


@pytest.mark.parametrize(("function", "shape", "other"), WAYS)
def test_a_size_that_would_take_another_way_is_refused_when_called(
    function: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], other: tuple[int, ...], tmp_path: Path
) -> None:
    module = randomised(Formula(function, a=conv(4, 4)))
    repconv_cli.fuse(module, tmp_path / "out.safetensors", input=shape)
    model = repconv_cli.load(tmp_path / "out.safetensors")
    x = noise(shape)[0]
    with torch.no_grad():
        assert torch.allclose(model(x), module(x), atol=1e-4)
    with pytest.raises(InputError, match=r"axis \d has size"):
        model(noise(other)[0])
