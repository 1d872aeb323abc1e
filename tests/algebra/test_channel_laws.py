"""Laws over single maps and their channels: fold, regroup, widen, embed, concatenate, select."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from repconv_cli.algebra import Axis, compose, concatenate, conv_map, embed, fold, identity, regroup, select, widen
from repconv_cli.errors import InexactError

from .factories import FACTORIES, PARTNERS_BESIDE, SIZES, Draw, answer, attempt, make, naming, random_input
from .oracle import assert_equal, differs_in_every_mode

PLAIN = [name for name in FACTORIES if make(name).dims and not make(name).torch.is_transposed]


def per_channel(vector, dims):
    return vector.reshape(1, -1, *(1,) * dims)


@pytest.mark.parametrize("name", FACTORIES)
def test_fold_is_scale_and_shift(name):
    sample, draw = make(name), Draw(name)
    scale, shift = draw.normal(sample.out_channels), draw.normal(sample.out_channels)
    for sizes in SIZES[sample.dims]:
        x = random_input(sample.in_channels, sizes)
        y, factor = sample.torch(x), per_channel(scale, sample.dims)
        assert_equal(fold(sample.map, scale, shift)(x), y * factor + per_channel(shift, sample.dims))
        assert_equal(fold(sample.map, scale)(x), y * factor)


@pytest.mark.parametrize("name", FACTORIES)
def test_fold_is_batch_norm_after_any_map(name):
    from repconv_cli.algebra import batch_norm_scale_and_shift

    sample, draw = make(name), Draw(name)
    channels = sample.out_channels
    gamma, beta, mean, var = (
        draw.normal(channels),
        draw.normal(channels),
        draw.normal(channels),
        draw.positive(channels),
    )
    gamma[0], var[-1] = -abs(gamma[0]), 1e-10
    x = random_input(sample.in_channels, SIZES[sample.dims][0])
    truth = functional.batch_norm(sample.torch(x), mean, var, gamma, beta, training=False, eps=1e-3)
    assert_equal(fold(sample.map, *batch_norm_scale_and_shift(gamma, beta, mean, var, 1e-3))(x), truth)
    plain = functional.batch_norm(sample.torch(x), mean, var, None, None, training=False, eps=1e-3)
    assert_equal(fold(sample.map, *batch_norm_scale_and_shift(None, None, mean, var, 1e-3))(x), plain)


@pytest.mark.parametrize("name", FACTORIES)
def test_regroup_changes_nothing_for_every_divisor(name):
    sample = make(name)
    x = random_input(sample.in_channels, SIZES[sample.dims][0])
    for groups in range(1, sample.map.groups + 1):
        if sample.map.groups % groups == 0:
            dense = regroup(sample.map, groups)
            assert dense.groups == groups
            assert dense.weight.shape[1] == sample.in_channels // groups
            assert_equal(dense(x), sample.torch(x))


@pytest.mark.parametrize(("groups", "wanted"), [(2, 4), (4, 3), (1, 2)])
def test_regroup_to_no_divisor_is_a_fault_of_the_caller(groups, wanted):
    map_ = conv_map(torch.randn(4, 4 // groups, 3, 3), groups=groups)
    with pytest.raises(ValueError, match=f"cannot regroup {groups} groups into {wanted}"):
        regroup(map_, wanted)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(("before", "after"), [(0, 3), (2, 0), (1, 2)])
def test_widen_changes_nothing_whatever_the_new_channels_hold(name, before, after):
    """The map is moved to channels ``[before, before + C)`` of a wider input, then reads all of it."""
    sample = make(name)
    channels = sample.in_channels
    x = random_input(before + channels + after, SIZES[sample.dims][0])
    narrow = select(identity(before + channels + after, sample.dims), before, before + channels)
    truth = sample.torch(x[:, before : before + channels])
    if sample.torch.is_transposed:
        assert_equal(widen(sample.map, 0, channels + after)(x[:, before:]), truth)
        return
    moved = compose(sample.map, narrow)
    assert moved.geometry.reads == before
    assert_equal(moved(x), truth)
    wide = widen(moved, 0, before + channels + after)
    assert (wide.geometry.reads, wide.geometry.in_channels) == (0, before + channels + after)
    assert_equal(wide(x), truth)


@pytest.mark.parametrize(("reads", "width"), [(1, 1), (1, 4), (0, 0), (2, 2)])
@pytest.mark.parametrize("channels", [1, 2])
def test_widen_to_channels_that_leave_some_out_is_a_fault_of_the_caller(reads, width, channels):
    map_ = identity(channels, dims=1)
    with pytest.raises(ValueError, match="must hold"):
        widen(map_, reads, width)


@pytest.mark.parametrize("name", PLAIN)
def test_embed_changes_nothing(name):
    """Zeros around the kernel and a denser lattice, with the padding grown to match."""
    sample = make(name)
    grown = tuple(
        Axis(a.extent + 3, a.stride, 1, a.low + 1, a.high + 2)
        if a.kernel > 1
        else Axis(4, a.stride, 1, a.low + 1, a.high + 2)
        for a in sample.map.geometry.axes
    )
    for sizes in SIZES[sample.dims]:
        x = random_input(sample.in_channels, sizes)
        assert_equal(embed(sample.map, grown)(x), sample.torch(x))


def test_embed_onto_a_dilated_lattice_keeps_the_taps_apart():
    weight = torch.randn(2, 2, 3).double()
    wide = embed(conv_map(weight, padding=4, dilation=4), (Axis(5, 1, 2, 4, 4),))
    assert wide.weight.shape == (2, 2, 5)
    x = random_input(2, (9,))
    assert_equal(wide(x), functional.conv1d(x, weight, padding=4, dilation=4))


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (Axis(3, low=1, high=1), Axis(3, low=0, high=2)),
        (Axis(3, low=1, high=1), Axis(2, low=1, high=0)),
        (Axis(3, low=1, high=1), Axis(5, dilation=2, low=3, high=5)),
        (Axis(2, dilation=3, low=2, high=1), Axis(4, dilation=2, low=2, high=4)),
    ],
)
def test_embed_where_taps_do_not_fit_is_a_fault_of_the_caller(small, large):
    map_ = conv_map(torch.randn(1, 1, small.kernel), padding=((small.low, small.high),), dilation=small.dilation)
    with pytest.raises(ValueError, match="are not taps of"):
        embed(map_, (large,))


@pytest.mark.parametrize("name", PARTNERS_BESIDE)
def test_concatenate_is_torch_cat_or_rightly_refused(name):
    left = make(name)
    for partner in PARTNERS_BESIDE[name]:
        right = make(partner, seed="right")
        with naming(left, right):
            for sizes in [*SIZES[left.dims], None]:
                judge_concatenation(left, right, sizes)


def judge_concatenation(left, right, sizes):
    all_sizes = SIZES[left.dims] if sizes is None else [sizes]
    examples = [random_input(left.in_channels, s) for s in all_sizes]
    outputs = [(answer(left, s), answer(right, s)) for s in all_sizes]
    alike = [a.shape[2:] == b.shape[2:] for a, b in outputs]
    joined, reason = attempt(concatenate, (left.map, right.map), sizes)
    if joined is None:
        if "padding modes differ" in reason and any(alike):
            # Channels are independent: with every padding mode, one of the two sides comes out wrong.
            assert left.has_spare_taps or right.has_spare_taps or left.torch.mode != right.torch.mode
        elif left.torch.is_transposed or right.torch.is_transposed:
            assert "a transposed convolution beside another" in reason
        elif "padding modes differ" not in reason:
            assert left.torch.stride != right.torch.stride or not any(alike)
        return
    if sizes is not None:
        assert all(alike), "torch cannot concatenate these, yet they were joined"
    for x, (a, b), same in zip(examples, outputs, alike, strict=True):
        if same:
            assert_equal(joined(x), torch.cat([a, b], 1))


def test_concatenated_padding_modes_are_refused_rightly():
    from .oracle import pad

    zeros, reflect = make("dense"), make("reflect")
    x = random_input(4, (9, 8))
    truth = torch.cat([zeros.torch(x), reflect.torch(x)], 1)

    def naive(x, mode):
        return torch.cat([part.torch.core(pad(x, part.torch.pads, mode)) for part in (zeros, reflect)], 1)

    assert differs_in_every_mode(naive, x, truth)
    with pytest.raises(InexactError, match="padding modes differ"):
        concatenate((zeros.map, reflect.map))


REFUSED = [
    ("dense", "strided", None, "different strides side by side"),
    ("dense", "dense valid", None, "output sizes differ whatever the input size"),
    ("strided", "strided average pool", (9, 8), "output sizes 5 beside 4 from input size 9"),
    ("dense", "transposed, stride 2", None, "a transposed convolution beside another in a concatenation"),
    ("circular", "replicate", None, "padding modes differ .*: circular beside replicate"),
]


@pytest.mark.parametrize(("left", "right", "sizes", "reason"), REFUSED)
def test_concatenate_refuses_with_its_reason(left, right, sizes, reason):
    with pytest.raises(InexactError, match=reason):
        concatenate((make(left).map, make(right).map), sizes)


def test_three_parts_stand_in_their_order():
    parts = [make(name) for name in ("dense", "pointwise", "even 4x4 same")]
    x = random_input(4, (9, 8))
    assert_equal(concatenate(tuple(p.map for p in parts))(x), torch.cat([p.torch(x) for p in parts], 1))


def test_one_part_alone_is_itself():
    sample = make("grouped")
    x = random_input(4, (9, 8))
    joined = concatenate((sample.map,))
    assert joined.groups == 2
    assert_equal(joined(x), sample.torch(x))


@pytest.mark.parametrize("name", FACTORIES)
def test_select_is_slicing_for_every_range(name):
    sample = make(name)
    for sizes in SIZES[sample.dims]:
        x = random_input(sample.in_channels, sizes)
        y = sample.torch(x)
        for start in range(sample.out_channels):
            for stop in range(start + 1, sample.out_channels + 1):
                assert_equal(select(sample.map, start, stop)(x), y[:, start:stop])


def test_select_of_whole_groups_keeps_them_and_reads_only_their_channels():
    part = select(make("channel multiplier").map, 2, 6)
    assert (part.groups, part.geometry.reads, part.geometry.in_channels) == (2, 1, 2)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_slices_of_a_map_concatenate_to_the_map(name):
    sample = make(name)
    if sample.torch.is_transposed:
        return
    x = random_input(sample.in_channels, SIZES[sample.dims][0])
    for cut in range(1, sample.out_channels):
        halves = (select(sample.map, 0, cut), select(sample.map, cut, sample.out_channels))
        assert_equal(concatenate(halves)(x), sample.torch(x))


@pytest.mark.parametrize("name", [n for n in FACTORIES if make(n).map.groups > 1 and not make(n).torch.is_transposed])
def test_the_groups_of_a_map_concatenate_to_as_many_groups(name):
    """Otherwise a split, convolved and joined input would become a dense convolution, many times the work."""
    sample = make(name)
    groups, per_group = sample.map.groups, sample.out_channels // sample.map.groups
    parts = tuple(select(sample.map, g * per_group, (g + 1) * per_group) for g in range(groups))
    joined = concatenate(parts)
    assert joined.groups == groups
    x = random_input(sample.in_channels, SIZES[sample.dims][0])
    assert_equal(joined(x), sample.torch(x))


def test_a_slice_of_a_slice_reads_the_right_channels():
    sample = make("depthwise")
    x = random_input(4, (9, 8))
    inner = select(select(sample.map, 1, 4), 1, 3)
    assert inner.geometry.reads == 2
    assert_equal(inner(x), sample.torch(x)[:, 2:4])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # (outputs, inputs, groups) of two parts on adjacent channels that are not the groups of one convolution:
        ((4, 2, 1), (2, 2, 1)),  # as many inputs, but another number of outputs
        ((4, 4, 2), (6, 6, 2)),  # groups of two beside groups of three
        ((4, 4, 2), (2, 2, 2)),  # groups of two beside groups of one: these still fit, as groups of two
        ((3, 3, 3), (2, 2, 1)),  # three groups of one beside a pair
    ],
)
def test_adjacent_parts_side_by_side_are_torch_cat_grouped_or_not(first, second):
    draw = Draw("adjacent")
    (out_a, in_a, groups_a), (out_b, in_b, groups_b) = first, second
    a, b = draw.normal(out_a, in_a // groups_a, 3), draw.normal(out_b, in_b // groups_b, 3)
    x = random_input(in_a + in_b, (9,))
    truth = torch.cat(
        [
            functional.conv1d(x[:, :in_a], a, padding=1, groups=groups_a),
            functional.conv1d(x[:, in_a:], b, padding=1, groups=groups_b),
        ],
        1,
    )
    whole = identity(in_a + in_b, dims=1)
    parts = (
        compose(conv_map(a, padding=1, groups=groups_a), select(whole, 0, in_a)),
        compose(conv_map(b, padding=1, groups=groups_b), select(whole, in_a, in_a + in_b)),
    )
    assert_equal(concatenate(parts)(x), truth)
