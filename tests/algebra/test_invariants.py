"""What is checked when a map is made, and what no operation may touch."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from repconv_cli import algebra
from repconv_cli.algebra import (
    Axis,
    ConvMap,
    Geometry,
    average_pool_map,
    compose,
    concatenate,
    conv_map,
    embed,
    fold,
    identity,
    merge,
    regroup,
    scale_map,
    select,
    subtract,
    transposed_conv_map,
    widen,
)

from .factories import FACTORIES, PARTNERS_BELOW, SIZES, SUMMANDS, attempt, make, naming, random_input

DOUBLE = torch.float64


def zeros(*shape, dtype=DOUBLE):
    return torch.zeros(*shape, dtype=dtype)


WRONG = {
    "too many outputs": (
        zeros(3, 2, 3),
        zeros(2),
        Geometry(2, 2, 1, (Axis(3),)),
        r"weight is \(3, 2, 3\), .* \(2, 2, 3\)",
    ),
    "inputs not divided by groups": (zeros(2, 2, 3), zeros(2), Geometry(2, 2, 2, (Axis(3),)), r"needs \(2, 1, 3\)"),
    "another kernel": (zeros(2, 2, 3), zeros(2), Geometry(2, 2, 1, (Axis(4),)), r"weight is .* needs \(2, 2, 4\)"),
    "a missing axis": (zeros(2, 2), zeros(2), Geometry(2, 2, 1, (Axis(),)), r"weight is \(2, 2\), .* \(2, 2, 1\)"),
    "a bias of another size": (
        zeros(2, 2, 1),
        zeros(1),
        Geometry(2, 2, 1, (Axis(),)),
        r"bias is \(1,\), needed \(2,\)",
    ),
    "a bias with an axis": (zeros(2, 2, 1), zeros(2, 1), Geometry(2, 2, 1, (Axis(),)), r"bias is \(2, 1\)"),
    "float32 weight": (
        zeros(2, 2, 1, dtype=torch.float32),
        zeros(2),
        Geometry(2, 2, 1, (Axis(),)),
        r"weight is torch\.float32, bias torch\.float64; needed torch\.float64",
    ),
    "float32 bias": (
        zeros(2, 2, 1),
        zeros(2, dtype=torch.float32),
        Geometry(2, 2, 1, (Axis(),)),
        r"bias torch\.float32; needed torch\.float64",
    ),
    "four axes": (
        zeros(2, 2, 1, 1, 1, 1),
        zeros(2),
        Geometry(2, 2, 1, (Axis(),) * 4),
        "4 spatial axes, needed at most 3",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_map_is_not_made_with(wrong):
    weight, bias, geometry, reason = WRONG[wrong]
    with pytest.raises(ValueError, match=reason):
        ConvMap(weight, bias, geometry)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((4, 6, 4), "groups=4 must divide out_channels=4 and in_channels=6"),
        ((6, 4, 4), "groups=4 must divide out_channels=6 and in_channels=4"),
        ((4, 4, 0), "groups=0 must divide"),
        ((4, 4, -2), "groups=-2 must divide"),
        ((4, 4, 1, (), "mirror"), "padding_mode='mirror', needed one of zeros, reflect, replicate, circular"),
        ((4, 4, 1, (Axis(0),)), "kernel, stride and dilation must be positive, found .*kernel=0"),
        ((4, 4, 1, (Axis(3, 0),)), "must be positive, found .*stride=0"),
        ((4, 4, 1, (Axis(3, 1, 0),)), "must be positive, found .*dilation=0"),
    ],
)
def test_a_geometry_is_not_made_with(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Geometry(*arguments)


def test_a_padding_that_torch_does_not_know_is_refused():
    with pytest.raises(ValueError, match="padding='full', needed a number, 'same' or 'valid'"):
        conv_map(zeros(1, 1, 3), padding="full")


def test_a_padding_mode_that_torch_does_not_know_is_refused():
    with pytest.raises(ValueError, match="padding_mode='mirror'"):
        conv_map(zeros(1, 1, 3), padding_mode="mirror")


@pytest.mark.parametrize(("kernel", "padding"), [(3, 3), (3, -1), (1, 1)])
def test_an_identity_outside_its_kernel_is_refused(kernel, padding):
    with pytest.raises(ValueError, match=f"padding={padding} must be an index of a kernel of {kernel}"):
        identity(2, kernel=kernel, padding=padding)


@pytest.mark.parametrize("groups", [3, 5])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups={groups} must divide"):
        conv_map(zeros(4, 2, 3), groups=groups)


@pytest.mark.parametrize("record", [make("dense").map, make("dense").map.geometry, Axis(3)])
def test_records_are_frozen(record):
    for field in fields(record):
        with pytest.raises(FrozenInstanceError, match="cannot assign to field"):
            setattr(record, field.name, None)


def test_a_map_reads_out_in_the_words_of_torch():
    map_ = conv_map(zeros(4, 2, 3, 2), stride=(2, 1), padding=(1, (0, 2)), dilation=(1, 3), groups=2)
    assert map_.stride == (2, 1)
    assert map_.padding == ((1, 1), (0, 2))
    assert map_.dilation == (1, 3)
    assert map_.groups == 2
    assert map_.padding_mode == "zeros"


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        (2, (3, 5), 1, ((2, 2), (2, 2))),
        ((2,), (3, 5), 1, ((2, 2), (2, 2))),
        ((1, 2), (3, 5), 1, ((1, 1), (2, 2))),
        (((0, 1), (2, 3)), (3, 5), 1, ((0, 1), (2, 3))),
        ("valid", (3, 5), 1, ((0, 0), (0, 0))),
        ("same", (3, 4), 1, ((1, 1), (1, 2))),
        ("same", (2, 4), 3, ((1, 2), (4, 5))),
    ],
)
def test_padding_may_be_said_in_every_way_that_torch_knows(padding, kernel, dilation, expected):
    assert conv_map(zeros(1, 1, *kernel), padding=padding, dilation=dilation).padding == expected


def snapshot(*maps):
    return [(map_.weight.clone(), map_.bias.clone(), map_.geometry) for map_ in maps]


def assert_untouched(maps, before):
    for map_, (weight, bias, geometry) in zip(maps, before, strict=True):
        assert torch.equal(map_.weight, weight)
        assert torch.equal(map_.bias, bias)
        assert map_.geometry == geometry


@pytest.mark.parametrize("name", FACTORIES)
def test_no_operation_on_one_map_writes_to_it(name):
    sample = make(name)
    before = snapshot(sample.map)
    scale, shift = torch.full((sample.out_channels,), -2.0, dtype=DOUBLE), torch.ones(sample.out_channels, dtype=DOUBLE)
    x = random_input(sample.in_channels, SIZES[sample.dims][0])
    x_before = x.clone()
    sample.map(x)
    fold(sample.map, scale, shift)
    regroup(sample.map, 1)
    widen(sample.map, 0, sample.in_channels + 1)
    select(sample.map, 1, sample.out_channels)
    select(sample.map, 0, sample.out_channels // 2)
    embed(sample.map, sample.map.geometry.axes)
    assert_untouched([sample.map], before)
    assert torch.equal(x, x_before)
    assert (scale == -2.0).all()
    assert (shift == 1.0).all()


@pytest.mark.parametrize("name", FACTORIES)
def test_no_operation_on_two_maps_writes_to_either(name):
    left = make(name)
    for partner in SUMMANDS[name]:
        maps = (left.map, make(partner, seed="right").map)
        before = snapshot(*maps)
        with naming(left, make(partner)):
            for operation in (merge, subtract, lambda a, b: concatenate((a, b))):
                attempt(operation, *maps)
            assert_untouched(maps, before)
    for partner in PARTNERS_BELOW[name]:
        maps = (left.map, make(partner, bias=False).map)
        before = snapshot(*maps)
        with naming(left, make(partner)):
            attempt(compose, *maps)
            assert_untouched(maps, before)


MADE_FROM = {
    "a convolution": (lambda w, v: conv_map(w, v), (2, 2, 3)),
    "a transposed convolution of stride 1": (
        lambda w, v: transposed_conv_map(w, v, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,)),
        (2, 2, 3),
    ),
    "a transposed convolution of stride 2": (
        lambda w, v: transposed_conv_map(w, v, stride=(2,), padding=(0,), output_padding=(0,), dilation=(1,)),
        (1, 2, 3),
    ),
    "a linear layer": (lambda w, v: conv_map(w, v), (2, 2)),
    "a scale": (lambda w, v: scale_map(w, v), (2,)),
}


@pytest.mark.parametrize("kind", MADE_FROM)
def test_a_map_does_not_change_when_what_it_was_made_from_does(kind):
    """A float64 source needs no conversion, and must be copied all the same."""
    build, shape = MADE_FROM[kind]
    weight, vector = torch.ones(shape, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    map_ = build(weight, vector)
    weight.mul_(3.0)
    vector.mul_(5.0)
    assert (map_.weight == 1.0).all()
    assert (map_.bias == 1.0).all()


@pytest.mark.parametrize("kind", MADE_FROM)
def test_a_map_carries_no_gradient_history(kind):
    build, shape = MADE_FROM[kind]
    weight = torch.ones(shape, dtype=torch.float32, requires_grad=True)
    map_ = build(weight, torch.ones(2, requires_grad=True))
    assert not map_.weight.requires_grad
    assert not map_.bias.requires_grad
    assert map_.weight.dtype == map_.bias.dtype == DOUBLE


def test_a_map_answers_in_the_precision_it_is_asked_in():
    sample = make("dense")
    x = random_input(4, (9, 8))
    assert sample.map(x.float()).dtype == torch.float32
    assert sample.map.weight.dtype == DOUBLE


def test_an_average_pool_divides_by_what_it_is_told():
    assert average_pool_map(1, (Axis(2, 2),)).weight.tolist() == [[[0.5, 0.5]]]
    assert average_pool_map(1, (Axis(2, 2),), divisor=4).weight.tolist() == [[[0.25, 0.25]]]


def test_every_public_name_exists_and_none_is_listed_twice():
    assert len(set(algebra.__all__)) == len(algebra.__all__)
    for name in algebra.__all__:
        assert getattr(algebra, name) is not None
