"""Random maps of every geometry, composed and merged: whatever is accepted is what torch computes."""

from __future__ import annotations

from math import gcd

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from repconv_cli.algebra import compose, concatenate, conv_map, merge, select

from .factories import Draw, attempt, random_input
from .oracle import CONVOLUTIONS, PADDING_MODES, TorchLayer, assert_equal, pad

MANY = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])


@st.composite
def layers(draw, dims, in_channels, out_channels, *, bias=None):
    """Return (torch's layer, our map): any kernel, stride, dilation, groups and mode; padding may also crop."""
    groups = draw(st.sampled_from([g for g in range(1, 5) if gcd(in_channels, out_channels) % g == 0]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    pads = tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", *PADDING_MODES[1:]]))
    has_bias = draw(st.booleans()) if bias is None else bias
    numbers = Draw(str(draw(st.integers(0, 99))))
    weight = numbers.normal(out_channels, in_channels // groups, *kernel)
    shift = numbers.normal(out_channels) if has_bias else None

    def core(x):
        if not dims:
            parts = [functional.linear(p, w) for p, w in zip(x.chunk(groups, 1), weight.chunk(groups), strict=True)]
            return torch.cat(parts, 1) + (0.0 if shift is None else shift)
        return CONVOLUTIONS[dims](x, weight, shift, stride, 0, dilation, groups)

    window = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    as_torch = TorchLayer(lambda x: core(pad(x, pads, mode)), core, in_channels, window, stride, pads, mode)
    ours = conv_map(weight, shift, stride=stride, padding=pads, dilation=dilation, groups=groups, padding_mode=mode)
    return as_torch, ours


def run(layer, x):
    """Return torch's answer, or drop the example where torch cannot run the layer."""
    try:
        y = layer(x)
    except RuntimeError:
        y = None
    assume(y is not None and y.numel() > 0)
    return y


def input_sizes(data, dims):
    return tuple(data.draw(st.integers(5, 9), label="size") for _ in range(dims))


def shapes(data):
    dims = data.draw(st.integers(0, 2), label="dims")
    return dims, *(data.draw(st.sampled_from([2, 4, 6]), label="channels") for _ in range(3))


@MANY
@given(st.data())
def test_an_accepted_composition_is_nesting(data):
    dims, first, middle, last = shapes(data)
    inner, inner_map = data.draw(layers(dims, first, middle))
    outer, outer_map = data.draw(layers(dims, middle, last))
    sizes = input_sizes(data, dims)
    x = random_input(first, sizes)
    truth = run(outer, run(inner, x))
    for asked in (sizes, None):
        composed, _ = attempt(compose, outer_map, inner_map, asked)
        if composed is not None:
            assert composed.geometry.output_sizes(sizes) == tuple(truth.shape[2:])
            # torch cannot wrap or reflect further than the input is wide; nesting reaches there in two steps.
            if composed.padding_mode == "zeros" or fits(composed, sizes):
                assert_equal(composed(x), truth)


def fits(map_, sizes):
    return all(max(pair) < size for pair, size in zip(map_.padding, sizes, strict=True))


@MANY
@given(st.data())
def test_an_accepted_merge_is_the_sum_and_a_concatenation_is_torch_cat(data):
    dims, channels, out_channels, _ = shapes(data)
    left, left_map = data.draw(layers(dims, channels, out_channels))
    right, right_map = data.draw(layers(dims, channels, out_channels))
    sizes = input_sizes(data, dims)
    x = random_input(channels, sizes)
    a, b = run(left, x), run(right, x)
    for asked in (sizes, None):
        merged, _ = attempt(merge, left_map, right_map, asked)
        joined, _ = attempt(concatenate, (left_map, right_map), asked)
        if a.shape == b.shape:
            for ours, truth in ((merged, a + b), (joined, torch.cat([a, b], 1))):
                if ours is not None and (ours.padding_mode == "zeros" or fits(ours, sizes)):
                    assert_equal(ours(x), truth)
        elif asked is not None:
            assert merged is None
            assert joined is None


@MANY
@given(st.data())
def test_a_block_of_branches_and_a_pointwise_after_them_is_one_map(data):
    """(k×k + dilated k×k) on one stride with the sizes kept alike, then a biased 1×1, then a slice of channels."""
    dims = data.draw(st.integers(1, 2))
    channels = data.draw(st.sampled_from([2, 4, 6]))
    stride, mode = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(PADDING_MODES))
    numbers = Draw(str(data.draw(st.integers(0, 99))))
    sizes = input_sizes(data, dims)
    x = random_input(channels, sizes)
    truth, merged = 0, None
    for _ in range(data.draw(st.integers(2, 4), label="branches")):
        kernel, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
        groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        reach = dilation * (kernel - 1)
        low = data.draw(st.integers(max(0, reach - 4), min(reach, 4)))
        pads = ((low, reach - low),) * dims
        weight, shift = numbers.normal(channels, channels // groups, *(kernel,) * dims), numbers.normal(channels)
        truth = truth + CONVOLUTIONS[dims](pad(x, pads, mode), weight, shift, stride, 0, dilation, groups)
        branch = conv_map(
            weight, shift, stride=stride, padding=pads, dilation=dilation, groups=groups, padding_mode=mode
        )
        merged = branch if merged is None else merge(merged, branch)
    weight, shift = numbers.normal(6, channels, *(1,) * dims), numbers.normal(6)
    start = data.draw(st.integers(0, 5))
    stop = data.draw(st.integers(start + 1, 6))
    fused = select(compose(conv_map(weight, shift), merged), start, stop)
    assert_equal(fused(x), CONVOLUTIONS[dims](truth, weight, shift)[:, start:stop])
