"""The border rule by brute force on one axis: accepted exactly where the naive composed convolution is right."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch.nn import functional

from repconv_cli.algebra import ConvMap, compose, conv_map
from repconv_cli.errors import InexactError

from .factories import Draw, attempt, random_input
from .oracle import RELATIVE, TorchLayer, assert_equal, is_equal, naive_composition, pad

INPUT_SIZES = range(4, 13)
KERNELS = range(1, 5)
STRIDES = range(1, 4)
OUTER_PADDINGS = {1: [(0, 0)], 2: [(1, 0), (0, 1), (1, 1)], 3: [(0, 1), (1, 1), (2, 0)], 4: [(0, 0), (1, 1), (1, 2)]}


@cache
def layer(role, kernel, stride, low, high, dilation=1):
    """Return (torch's layer, our map) of a random unbiased one-channel convolution."""
    weight = Draw(f"{role}{kernel}{stride}{low}{high}").normal(1, 1, kernel)
    pads = ((low, high),)

    def core(x):
        return functional.conv1d(x, weight, stride=stride, dilation=dilation)

    window = (dilation * (kernel - 1) + 1,)
    as_torch = TorchLayer(lambda x: core(pad(x, pads)), core, 1, window, (stride,), pads)
    return as_torch, conv_map(weight, stride=stride, padding=pads, dilation=dilation)


def paddings(kernel, most=2):
    return list(product(range(min(kernel, most + 1)), repeat=2))


def agree(found, expected):
    """As ``is_equal``, quicker: all values here are of order 1, and shapes must match."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=RELATIVE, atol=RELATIVE)


@cache
def inside(inner, size):
    """Return torch's output of the inner layer on the one random input of that size."""
    return inner(random_input(1, (size,), batch=1))


def middle_size(inner, size):
    return (size + sum(inner.pads[0]) - inner.window[0]) // inner.stride[0] + 1


def runs(outer, inner, size):
    """Whether torch can run both layers on this size."""
    if size + sum(inner.pads[0]) < inner.window[0]:
        return False
    return middle_size(inner, size) + sum(outer.pads[0]) >= outer.window[0]


def verdicts(outer_parts, inner_parts):
    """Yield (size, whether we accept, whether the naive composed convolution is right); accepted ones must be equal."""
    (outer, outer_map), (inner, inner_map) = outer_parts, inner_parts
    naive = naive_composition(outer, inner)
    for size in INPUT_SIZES:
        if not runs(outer, inner, size):
            continue
        x = random_input(1, (size,), batch=1)
        truth = outer(inside(inner, size))
        accepted, _ = attempt(compose, outer_map, inner_map, (size,))
        if accepted is not None:
            assert agree(accepted(x), truth), f"{outer_map.geometry} @ {inner_map.geometry} at {size}"
        yield size, accepted is not None, agree(naive(x, "zeros"), truth)


@pytest.mark.parametrize("inner_stride", STRIDES)
@pytest.mark.parametrize("inner_kernel", KERNELS)
def test_zero_padding_is_accepted_exactly_where_the_naive_convolution_is_right(inner_kernel, inner_stride):
    for low, high in paddings(inner_kernel):
        inner = layer("inner", inner_kernel, inner_stride, low, high)
        for kernel, stride in product(KERNELS, STRIDES):
            for pads in OUTER_PADDINGS[kernel]:
                outer = layer("outer", kernel, stride, *pads)
                for size, accepted, right in verdicts(outer, inner):
                    verdict = "accepted" if accepted else "refused"
                    assert accepted == right, f"{outer[1].geometry} @ {inner[1].geometry} at {size} was {verdict}"


@pytest.mark.parametrize("inner_stride", STRIDES)
@pytest.mark.parametrize("inner_kernel", KERNELS)
def test_free_sizes_are_accepted_exactly_where_the_naive_convolution_is_right_at_every_size(inner_kernel, inner_stride):
    for low, high in paddings(inner_kernel):
        inner = layer("inner", inner_kernel, inner_stride, low, high)
        for kernel, stride in product(KERNELS, (1, 2)):
            for pads in {(0, 0), (1, 1), (0, 1)} & set(paddings(kernel)):
                outer = layer("outer", kernel, stride, *pads)
                naive = naive_composition(outer[0], inner[0])
                right = []
                composed, _ = attempt(compose, outer[1], inner[1])
                for size in INPUT_SIZES:
                    if not runs(outer[0], inner[0], size):
                        continue
                    x = random_input(1, (size,), batch=1)
                    truth = outer[0](inside(inner[0], size))
                    right.append(agree(naive(x, "zeros"), truth))
                    if composed is not None:
                        assert agree(composed(x), truth), f"{outer[1].geometry} @ {inner[1].geometry} at {size}"
                assert (composed is not None) == all(right), f"{outer[1].geometry} @ {inner[1].geometry}: {right}"


@pytest.mark.parametrize("dilation", [2, 3])
def test_dilated_kernels_are_never_accepted_wrongly(dilation):
    """The rule may be cautious here: a dilated outer kernel can step over the rows that would be wrong."""
    accepted_count = refused_count = 0
    for inner_kernel, inner_stride, kernel, stride in product((1, 2, 3), (1, 2), (1, 2, 3), (1, 2)):
        for inner_dilation, outer_dilation in ((dilation, 1), (1, dilation), (dilation, dilation)):
            inner = layer("inner", inner_kernel, inner_stride, 1, 2, inner_dilation)
            outer = layer("outer", kernel, stride, 2, 1, outer_dilation)
            for _, accepted, right in verdicts(outer, inner):
                accepted_count += accepted
                refused_count += not accepted
                assert right or not accepted
    assert accepted_count > 50
    assert refused_count > 50


def test_a_3x3_of_stride_2_under_a_padded_3x3_is_exact_for_9_and_wrong_for_8():
    weight_in, weight_out = Draw("in").normal(2, 2, 3, 3), Draw("out").normal(2, 2, 3, 3)
    inner, outer = conv_map(weight_in, stride=2, padding=1), conv_map(weight_out, padding=1)
    nine = random_input(2, (9, 9))
    truth = functional.conv2d(functional.conv2d(nine, weight_in, stride=2, padding=1), weight_out, padding=1)
    composed = compose(outer, inner, (9, 9))
    assert_equal(composed(nine), truth)
    for sizes in [(8, 8), (9, 8), (8, 9)]:
        with pytest.raises(
            InexactError, match=r"zero padding 1 after .* at input size 8 \(it would still touch 1 input"
        ):
            compose(outer, inner, sizes)
        x = random_input(2, sizes)
        truth = functional.conv2d(functional.conv2d(x, weight_in, stride=2, padding=1), weight_out, padding=1)
        wrong = composed(x)
        assert wrong.shape == truth.shape
        assert_equal(wrong[..., :-1, :-1], truth[..., :-1, :-1])
        assert float((wrong - truth).abs().max()) > 0.1
    with pytest.raises(InexactError, match="for some input sizes"):
        compose(outer, inner)


def test_one_axis_may_be_fixed_while_the_other_stays_free():
    """Height fixed at 9 is exact; width is free only where its own kernel allows it."""
    weight_in, weight_out = Draw("in").normal(2, 2, 3, 1), Draw("out").normal(2, 2, 3, 3)
    inner, outer = conv_map(weight_in, stride=(2, 1), padding=(1, 0)), conv_map(weight_out, padding=1)
    composed = compose(outer, inner, (9, None))
    for width in (3, 4, 8):
        x = random_input(2, (9, width))
        inside = functional.conv2d(x, weight_in, stride=(2, 1), padding=(1, 0))
        assert_equal(composed(x), functional.conv2d(inside, weight_out, padding=1))
    with pytest.raises(InexactError, match="for some input sizes"):
        compose(outer, inner, (None, 9))


def test_padding_that_a_stride_leaves_unread_is_no_reason_to_refuse():
    """A strided outer kernel that ends at the last row reads nothing beyond: exact at 8, though its padding is 1."""
    weight_in, weight_out = Draw("in").normal(1, 1, 3), Draw("out").normal(1, 1, 3)
    inner, outer = conv_map(weight_in, stride=2, padding=1), conv_map(weight_out, stride=2, padding=1)
    x = random_input(1, (8,))
    truth = functional.conv1d(functional.conv1d(x, weight_in, stride=2, padding=1), weight_out, stride=2, padding=1)
    assert_equal(compose(outer, inner, (8,))(x), truth)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_biased_pointwise_map_commutes_with_padding_that_repeats_values(mode):
    weight_in, bias, weight_out = Draw("in").normal(3, 2, 1), Draw("b").normal(3), Draw("out").normal(2, 3, 4)
    composed = compose(conv_map(weight_out, padding=((2, 1),), padding_mode=mode), conv_map(weight_in, bias))
    assert composed.padding_mode == mode
    for size in INPUT_SIZES:
        x = random_input(2, (size,))
        inside = functional.conv1d(x, weight_in, bias)
        assert_equal(composed(x), functional.conv1d(functional.pad(inside, (2, 1), mode), weight_out))


def test_circular_after_circular_is_one_convolution_on_the_circle():
    weight_in, bias, weight_out = Draw("in").normal(3, 2, 3), Draw("b").normal(3), Draw("out").normal(2, 3, 4)
    inner = conv_map(weight_in, bias, padding=((2, 0),), padding_mode="circular")
    outer = conv_map(weight_out, stride=2, padding=((0, 2),), padding_mode="circular")
    for size in INPUT_SIZES:
        x = random_input(2, (size,))
        inside = functional.conv1d(functional.pad(x, (2, 0), "circular"), weight_in, bias)
        truth = functional.conv1d(functional.pad(inside, (0, 2), "circular"), weight_out, stride=2)
        assert_equal(compose(outer, inner)(x), truth)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_a_3_wide_kernel_does_not_commute_with_reflect_or_replicate(mode):
    inner = TorchLayer(
        lambda x: core_in(functional.pad(x, (1, 1), mode)), lambda x: core_in(x), 1, (3,), (1,), ((1, 1),), mode
    )
    weight_in, weight_out = Draw("in").normal(1, 1, 3), Draw("out").normal(1, 1, 3)

    def core_in(x):
        return functional.conv1d(x, weight_in)

    x = random_input(1, (8,))
    truth = functional.conv1d(functional.pad(inner(x), (1, 1), mode), weight_out)
    outer = TorchLayer(lambda x: x, lambda x: functional.conv1d(x, weight_out), 1, (3,), (1,), ((1, 1),), mode)
    assert not is_equal(naive_composition(outer, inner)(x, mode), truth)
    with pytest.raises(InexactError, match=f"{mode} padding after a 3 convolution"):
        compose(
            conv_map(weight_out, padding=1, padding_mode=mode), conv_map(weight_in, padding=1, padding_mode=mode), (8,)
        )


def test_a_transposed_stride_1_convolution_obeys_the_rule_as_the_plain_one_it_is():
    from repconv_cli.algebra import transposed_conv_map

    weight = Draw("t").normal(1, 1, 1)
    wide = Draw("w").normal(1, 1, 3)
    inner = transposed_conv_map(weight, stride=(1,), padding=(0,), output_padding=(0,), dilation=(1,))
    x = random_input(1, (8,))
    truth = functional.conv1d(functional.conv_transpose1d(x, weight), wide, padding=1)
    assert_equal(compose(conv_map(wide, padding=1), inner)(x), truth)


def test_a_stride_1_convolution_is_the_transposed_one_of_its_flipped_kernel():
    weight = Draw("turned").normal(3, 2, 3, 2)
    plain = conv_map(weight, padding=((2, 2), (0, 0)), dilation=(2, 1))
    turned = plain.geometry.as_transposed()
    assert turned is not None
    map_ = ConvMap(plain.weight.flip((2, 3)), plain.bias, turned)
    assert [(axis.low, axis.high) for axis in turned.axes] == [(2, 2), (1, 1)]
    x = random_input(2, (6, 5))
    assert_equal(map_(x), plain(x))
    assert turned.output_sizes((6, 5)) == plain.geometry.output_sizes((6, 5))


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": ((0, 1),)}, {"padding": 3}, {"padding": 1, "padding_mode": "reflect"}],
    ids=["stride", "unequal sides", "padding beyond the kernel", "mode"],
)
def test_what_torch_has_no_transposed_convolution_for_has_no_such_form(options):
    assert conv_map(torch.ones(1, 1, 3), **options).geometry.as_transposed() is None


def test_zero_is_no_bias_and_any_other_constant_is():
    weight, wide = torch.ones(1, 1, 1), torch.ones(1, 1, 3)
    assert compose(conv_map(wide, padding=1), conv_map(weight, torch.zeros(1))).bias.tolist() == [0.0]
    with pytest.raises(InexactError, match="a biased map before zero padding"):
        compose(conv_map(wide, padding=1), conv_map(weight, torch.full((1,), 1e-30)))
    assert compose(conv_map(wide), conv_map(weight, torch.full((1,), 2.0))).bias.tolist() == [6.0]


def test_a_padding_mode_that_pads_nothing_does_not_stand_in_the_way():
    """A mode is only a word where nothing is padded."""
    weight_in, weight_out = Draw("in").normal(1, 1, 2), Draw("out").normal(1, 1, 3)
    inner, outer = conv_map(weight_in, stride=2, padding_mode="reflect"), conv_map(weight_out, padding=1)
    x = random_input(1, (8,))
    truth = functional.conv1d(functional.conv1d(x, weight_in, stride=2), weight_out, padding=1)
    assert_equal(compose(outer, inner, (8,))(x), truth)
