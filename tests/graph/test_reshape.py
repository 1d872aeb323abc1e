"""Maps on the channels of each position, through permutes and reshapes that leave the channels whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repconv_cli.errors import InexactError
from repconv_cli.graph.arrange import PERMUTES, Layout, moves, order_of, reshaped, scatters, unmoved
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.trace import trace
from tests.graph.block_case import assert_leaves
from tests.graph.models import conv, conv_bn
from tests.graph.refusal_case import formula

IMAGE = (2, 4, 6, 6)
TOKENS = (2, 10, 4)
PATCHES = (2, 3, 2, 3, 2, 4)


@dataclass(frozen=True)
class Moved:
    """A model, and the (convolutions, norms, operations) that stay."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    left: tuple[int, int, int]
    is_spatial_free: bool = False


def levit(part: Any, x: Tensor) -> Tensor:
    y = part.linear(x)
    normed: Tensor = part.norm(y.flatten(0, 1)).reshape_as(y)
    return normed


def tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def image_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 6, 6)


MOVED = [
    Moved("levit", formula(levit, linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6)), TOKENS, (0, 0, 1)),
    Moved(
        "levit_at_free_length", formula(levit, linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6)), TOKENS, (0, 0, 1), True
    ),
    Moved(
        "norm_on_transposed_tokens",
        formula(lambda p, x: p.norm(p.linear(x).transpose(1, 2)), linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6)),
        TOKENS,
        (0, 0, 2),
    ),
    Moved(
        "norm_before_tokens",
        formula(lambda p, x: p.linear(tokens_of(p.norm(x))), linear=nn.Linear(4, 6), norm=nn.BatchNorm2d(4)),
        IMAGE,
        (0, 0, 3),
    ),
    Moved(
        "convolution_then_tokens_then_norm",
        formula(lambda p, x: p.norm(tokens_of(p.conv(x)).transpose(1, 2)), conv=conv(4, 6), norm=nn.BatchNorm1d(6)),
        IMAGE,
        (1, 0, 2),
    ),
    Moved(
        "narrow_convolution_then_linear_on_tokens",
        formula(lambda p, x: p.linear(tokens_of(p.conv(x))), conv=conv(4, 8, 1), linear=nn.Linear(8, 2)),
        IMAGE,
        (0, 0, 3),
    ),
    Moved(
        "tokens_and_back_then_a_padded_convolution",
        formula(
            lambda p, x: p.conv(image_of(p.linear(tokens_of(x)))),
            linear=nn.Linear(4, 4, bias=False),
            conv=conv(4, 4, 3),
        ),
        IMAGE,
        (1, 0, 1),
    ),
    Moved(
        "branches_that_are_moved_alike",
        formula(
            lambda p, x: tokens_of(p.a(x)) + tokens_of(p.b(x)) + p.c(tokens_of(x)),
            a=conv_bn(4, 4, 3),
            b=conv_bn(4, 4, 1),
            c=nn.Linear(4, 4),
        ),
        IMAGE,
        (1, 0, 3),
    ),
    Moved(
        "channels_side_by_side_on_the_last_axis",
        formula(
            lambda p, x: torch.cat([p.a(x), p.b(x)], -1).relu(),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 2),
        ),
        TOKENS,
        (0, 0, 2),
    ),
    Moved(
        "head_on_a_single_position",
        formula(
            lambda p, x: p.head(p.norm(p.conv(x.mean((2, 3), keepdim=True)).flatten(1))),
            conv=conv(4, 6, 1),
            norm=nn.BatchNorm1d(6),
            head=nn.Linear(6, 3),
        ),
        IMAGE,
        (0, 0, 3),
    ),
    Moved(
        "there_and_back",
        formula(lambda p, x: x.transpose(1, 2).relu().transpose(1, 2).transpose(1, 2).transpose(1, 2)),
        TOKENS,
        (0, 0, 3),
    ),
    Moved(
        "a_scale_on_moved_channels_is_not_moved_back",
        formula(lambda p, x: p.norm(x.transpose(1, 2)).transpose(1, 2) * 2, norm=nn.BatchNorm1d(4)),
        TOKENS,
        (0, 0, 1),
    ),
]


@pytest.mark.parametrize("case", MOVED, ids=lambda case: case.name)
def test_a_map_on_channels_passes_through_moves(case: Moved) -> None:
    other = (3, case.shape[1] + 3, *case.shape[2:]) if case.is_spatial_free else (3, *case.shape[1:])
    assert_leaves(case.make, case.left, case.shape, other, is_spatial_free=case.is_spatial_free)


KEPT = [
    Moved(
        "channels_cut_into_heads",
        formula(
            lambda p, x: p.norm(p.linear(x).reshape(x.shape[0], 10, 2, 3).permute(0, 2, 3, 1)),
            linear=nn.Linear(4, 6),
            norm=nn.BatchNorm2d(2),
        ),
        TOKENS,
        (0, 1, 4),
    ),
    Moved(
        "kernel_over_merged_positions",
        formula(lambda p, x: p.b(p.a(x).flatten(2)), a=conv(4, 4, 1, bias=False), b=nn.Conv1d(4, 4, 3)),
        IMAGE,
        (2, 0, 3),
    ),
    Moved(
        "branches_moved_differently",
        formula(lambda p, x: p.a(x) + p.b(x.transpose(2, 3)), a=conv(4, 4, 1), b=conv(4, 4, 1)),
        IMAGE,
        (2, 0, 4),
    ),
    Moved(
        "rows_that_a_single_permute_would_tear_apart",
        formula(lambda p, x: p.linear(x.permute(0, 2, 4, 1, 3, 5)).transpose(-1, -2), linear=nn.Linear(4, 6)),
        PATCHES,
        (0, 0, 3),
    ),
    Moved(
        "rows_are_not_torn_apart_for_a_scale",
        formula(lambda p, x: p.linear(x.permute(0, 2, 4, 1, 3, 5)).mul(2).transpose(-1, -2), linear=nn.Linear(4, 6)),
        PATCHES,
        (0, 0, 3),
    ),
]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_what_a_move_forbids_stays(case: Moved) -> None:
    assert_leaves(case.make, case.left, case.shape, (3, *case.shape[1:]))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout]:
    """Return sizes and a layout of them, every axis in it."""
    sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=4)))
    order = draw(st.permutations(range(len(sizes))))
    groups: list[tuple[int, ...]] = []
    for axis in order:
        if groups and draw(st.booleans()):
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return sizes, tuple(groups)


@settings(max_examples=200, deadline=None)
@given(layouts(), st.randoms(use_true_random=False))
def test_moves_do_what_the_layout_says(drawn: tuple[tuple[int, ...], Layout], random: Any) -> None:
    sizes, layout = drawn
    x = torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)
    expected = x.permute([axis for group in layout for axis in group])
    shape = [int(torch.Size([sizes[a] for a in group]).numel()) for group in layout]
    for _ in range(random.randint(0, 2)):
        shape.insert(random.randint(0, len(shape)), 1)
    expected = expected.reshape(shape)
    start = tuple((axis,) for group in layout for axis in group)
    found = reshaped(start, tuple((size, False) for size in sizes), tuple((size, False) for size in shape))
    y = x
    for target, operands in moves(found, len(sizes)):
        y = target(y, *operands)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("axes", range(1, 6))
def test_what_moves_values_one_by_one(axes: int) -> None:
    """All but those that copy rows, and those that transpose matrices: two runs of axes behind those that stay."""
    rows = {(*order, axes - 1) for order in permutations(range(axes - 1))}
    matrices = {
        (*range(first), *range(second, axes), *range(first, second))
        for first in range(axes)
        for second in range(first, axes)
    }
    for order in permutations(range(axes)):
        assert scatters(order) == (order not in rows | matrices), order


def test_what_has_no_two_axes_has_one_order() -> None:
    class Vectors(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            total = x.sum()
            return x[0].t(), total.transpose(0, -1), total.permute([])

    program = trace(Vectors(), (torch.randn(2, 6),), {})
    orders = [order_of(node) for node in program.graph.nodes if node.target in PERMUTES]
    assert orders == [[0], [], []]
    assert make_plan(program).blocks == ()


def test_a_reshape_that_cuts_an_axis_is_none() -> None:
    sizes = ((2, True), (6, False), (4, False))
    with pytest.raises(InexactError, match="cuts an axis"):
        reshaped(unmoved(3), sizes, ((2, True), (3, False), (8, False)))
    assert reshaped(((0,), (1, 2)), sizes, ((2, True), (6, False), (4, False))) == unmoved(3)
