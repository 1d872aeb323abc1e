"""The seed: what must hold of kernels, identities and groups, in the words of the layers themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from repconv_cli.algebra import Axis, compose, concatenate, conv_map, embed, identity, merge, regroup, select
from repconv_cli.errors import InexactError

from .factories import Draw, random_input
from .oracle import assert_equal

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def block(x, square, pointwise, padding):
    """Return k×k + 1×1 + identity, as three branches; what the kernel reaches past ``padding`` is padded after."""
    after = square.shape[-1] - 1 - padding
    padded = functional.pad(x, (padding, after, padding, after))
    return functional.conv2d(padded, square) + functional.conv2d(x, pointwise) + x


def one_convolution(x, square, pointwise, padding):
    kernel = square.shape[-1]
    after = kernel - 1 - padding
    axes = (Axis(kernel, low=padding, high=after),) * 2
    pads = ((padding, after),) * 2
    small, delta = embed(conv_map(pointwise), axes), identity(x.shape[1], 2, kernel, padding)
    weight = square + small.weight + regroup(delta, 1).weight
    merged = merge(merge(conv_map(square, padding=pads), conv_map(pointwise)), identity(x.shape[1]))
    assert_equal(merged.weight, weight)
    assert merged.padding == pads
    return functional.conv2d(functional.pad(x, (padding, after, padding, after)), merged.weight)


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_sum_of_three_branches_is_one_kernel_on_two_channels_of_ones(kernel):
    draw = Draw("ones")
    square, pointwise = draw.normal(2, 2, kernel, kernel), draw.normal(2, 2, 1, 1)
    x = torch.ones(1, 2, 9, 9, dtype=torch.float64)
    truth = functional.conv2d(x, square, padding=kernel // 2) + functional.conv2d(x, pointwise) + x
    fused = one_convolution(x, square, pointwise, kernel // 2)
    assert torch.isclose(fused, truth, rtol=1e-11, atol=1e-12).all()
    assert torch.isclose(block(x, square, pointwise, kernel // 2), truth, rtol=1e-11, atol=1e-12).all()


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_sum_of_three_branches_is_one_kernel_for_any_channels_and_any_kernel(channels, kernel, data):
    """Odd or even, whatever the padding: the 1×1 and the identity sit at the index ``padding``."""
    padding = data.draw(st.integers(0, kernel - 1))
    draw = Draw(f"{channels} {kernel} {padding}")
    square, pointwise = draw.normal(channels, channels, kernel, kernel), draw.normal(channels, channels, 1, 1)
    x = random_input(channels, (7, 9))
    truth = block(x, square, pointwise, padding)
    assert_equal(one_convolution(x, square, pointwise, padding), truth)


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_a_pointwise_kernel_embeds_at_the_index_of_the_padding_and_nowhere_else(channels, kernel, data):
    padding = data.draw(st.integers(0, kernel - 1))
    pointwise = Draw(f"{channels}").normal(channels, channels, 1, 1)
    axes = (Axis(kernel, low=padding, high=kernel - 1 - padding),) * 2
    weight = embed(conv_map(pointwise), axes).weight
    after = kernel - 1 - padding
    assert torch.equal(weight, functional.pad(pointwise, (padding, after, padding, after)))


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_the_identity_is_a_depthwise_delta_kernel(channels, kernel, data):
    padding = data.draw(st.integers(0, kernel - 1))
    delta = identity(channels, 2, kernel, padding)
    assert delta.weight.shape == (channels, 1, kernel, kernel)
    assert delta.groups == channels
    assert float(delta.weight.sum()) == channels
    assert (delta.weight[:, 0, padding, padding] == 1.0).all()
    x = random_input(channels, (7, 9))
    after = kernel - 1 - padding
    padded = functional.pad(x, (padding, after, padding, after))
    assert torch.equal(functional.conv2d(padded, delta.weight, groups=channels), x)
    assert torch.equal(delta(x), x)


@pytest.mark.parametrize("kernel", [2, 4, 6])
def test_under_an_even_kernel_the_middle_is_the_wrong_index_and_the_padding_the_right_one(kernel):
    """With padding (k - 1) // 2 before, the middle of an even kernel is one position too far."""
    padding = (kernel - 1) // 2
    draw = Draw(f"even {kernel}")
    square, pointwise = draw.normal(3, 3, kernel, kernel), draw.normal(3, 3, 1, 1)
    x = random_input(3, (9, 8))
    truth = functional.conv2d(x, square, padding="same") + functional.conv2d(x, pointwise)
    merged = merge(conv_map(square, padding="same"), conv_map(pointwise))
    assert_equal(merged(x), truth)

    def by_hand(index):
        weight = square.clone()
        weight[:, :, index, index] += pointwise[:, :, 0, 0]
        return functional.conv2d(x, weight, padding="same")

    assert_equal(by_hand(padding), truth)
    assert torch.equal(merged.weight[:, :, padding, padding], square[:, :, padding, padding] + pointwise[:, :, 0, 0])
    assert float((by_hand(kernel // 2) - truth).abs().max()) > 1.0


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_a_grouped_convolution_is_the_concatenation_of_its_groups(groups, inputs, outputs, kernel):
    """Weight ``(O, I/groups, k, k)``: group g turns its own slice of channels into its own slice of outputs."""
    weight = Draw(f"{groups} {inputs} {outputs} {kernel}").normal(groups * outputs, inputs, kernel, kernel)
    bias = Draw("bias").normal(groups * outputs)
    x = random_input(groups * inputs, (7, 6))
    truth = functional.conv2d(x, weight, bias, groups=groups)
    parts = [
        functional.conv2d(part, w, b)
        for part, w, b in zip(x.chunk(groups, 1), weight.chunk(groups), bias.chunk(groups), strict=True)
    ]
    assert_equal(torch.cat(parts, 1), truth)
    grouped = conv_map(weight, bias, groups=groups)
    assert grouped.weight.shape == (groups * outputs, inputs, kernel, kernel)
    slices = tuple(select(grouped, g * outputs, (g + 1) * outputs) for g in range(groups))
    for slice_, part in zip(slices, parts, strict=True):
        assert_equal(slice_(x), part)
    joined = concatenate(slices)
    assert joined.groups == groups
    assert torch.equal(joined.weight, weight)
    assert_equal(joined(x), truth)


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_regrouped_to_one_group_it_is_dense_with_zeros_between_the_groups(groups, inputs, outputs, kernel):
    weight = Draw(f"{groups} {inputs} {outputs} {kernel}").normal(groups * outputs, inputs, kernel, kernel)
    dense = regroup(conv_map(weight, groups=groups), 1)
    assert dense.weight.shape == (groups * outputs, groups * inputs, kernel, kernel)
    expected = torch.zeros(groups * outputs, groups * inputs, kernel, kernel, dtype=torch.float64)
    for g in range(groups):
        rows, columns = slice(g * outputs, (g + 1) * outputs), slice(g * inputs, (g + 1) * inputs)
        expected[rows, columns] = weight[rows]
    assert torch.equal(dense.weight, expected)
    x = random_input(groups * inputs, (7, 6))
    assert_equal(functional.conv2d(x, dense.weight), functional.conv2d(x, weight, groups=groups))


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 2))
def test_depthwise_then_pointwise_is_the_dense_convolution_that_it_factors(channels, outputs, kernel, stride):
    draw = Draw(f"{channels} {outputs} {kernel}")
    depthwise, pointwise = draw.normal(channels, 1, kernel, kernel), draw.normal(outputs, channels, 1, 1)
    x = random_input(channels, (8, 7))
    padding = kernel // 2
    inside = functional.conv2d(x, depthwise, stride=stride, padding=padding, groups=channels)
    truth = functional.conv2d(inside, pointwise)
    factored = torch.einsum("oc,cyx->ocyx", pointwise[:, :, 0, 0], depthwise[:, 0])
    assert_equal(functional.conv2d(x, factored, stride=stride, padding=padding), truth)
    composed = compose(conv_map(pointwise), conv_map(depthwise, stride=stride, padding=padding, groups=channels))
    assert composed.groups == 1
    assert_equal(composed.weight, factored)
    assert_equal(composed(x), truth)


def test_a_biased_pointwise_before_a_padded_3x3_agrees_inside_is_off_at_the_border_and_is_refused():
    draw = Draw("border")
    pointwise, bias, square = draw.normal(4, 4, 1, 1), draw.normal(4), draw.normal(4, 4, 3, 3)
    x = random_input(4, (9, 8))
    truth = functional.conv2d(functional.conv2d(x, pointwise, bias), square, padding=1)
    weight = torch.einsum("omyx,mi->oiyx", square, pointwise[:, :, 0, 0])
    naive = functional.conv2d(x, weight, square.sum((2, 3)) @ bias, padding=1)
    assert_equal(naive[..., 1:-1, 1:-1], truth[..., 1:-1, 1:-1])
    off = (naive - truth).abs().amax((0, 1)) > 0.1
    frame = torch.ones(9, 8, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert torch.equal(off, frame)
    outer = conv_map(square, padding=1)
    for sizes in (None, (9, 8)):
        with pytest.raises(InexactError, match="a biased map before zero padding"):
            compose(outer, conv_map(pointwise, bias), sizes)
    unbiased = functional.conv2d(functional.conv2d(x, pointwise), square, padding=1)
    assert_equal(compose(outer, conv_map(pointwise))(x), unbiased)
    unpadded = functional.conv2d(functional.conv2d(x, pointwise, bias), square)
    assert_equal(compose(conv_map(square), conv_map(pointwise, bias))(x), unpadded)
