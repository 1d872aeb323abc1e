"""The checker is checked, and every factory gives what torch gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from .factories import FACTORIES, SIZES, make, random_input
from .oracle import assert_equal, impulse_response, is_equal, naive_composition


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_map_gives_what_its_torch_layer_gives(name, bias):
    sample = make(name, bias=bias)
    for sizes in SIZES[sample.dims]:
        x = random_input(sample.in_channels, sizes)
        assert_equal(sample.map(x), sample.torch(x))


@pytest.mark.parametrize("name", FACTORIES)
def test_a_geometry_predicts_the_output_size_of_torch(name):
    sample = make(name)
    for sizes in SIZES[sample.dims]:
        x = random_input(sample.in_channels, sizes)
        assert sample.map.geometry.output_sizes(sizes) == tuple(sample.torch(x).shape[2:])


@pytest.mark.parametrize("name", [n for n in FACTORIES if make(n).dims and not make(n).torch.is_transposed])
def test_a_kernel_is_the_impulse_response_of_its_torch_layer(name):
    """And has no spare taps: it holds as many nonzero weights as the response."""
    sample = make(name)
    kernel, bias = impulse_response(sample.torch.core, sample.in_channels, sample.torch.window)
    x = random_input(sample.in_channels, sample.torch.window)
    flat = kernel.flatten(1) @ x.flatten(1).T + bias[:, None]
    unpadded = sample.torch.core(x).flatten(1).T
    assert_equal(flat, unpadded)
    assert_equal(sample.map.bias[None], bias[None])
    nonzero = int((sample.map.weight != 0).sum())
    assert nonzero == int((kernel.abs() > 1e-13).sum())


WRONG = {
    "twice the output": lambda y: 2 * y,
    "a sign": lambda y: -y,
    "swapped channels": lambda y: y.flip(1),
    "one wrong border row": lambda y: torch.cat([y[:, :, :1] + 1e-6, y[:, :, 1:]], 2),
    "one wrong channel": lambda y: torch.cat([y[:, :1] * (1 + 1e-9), y[:, 1:]], 1),
    "a shift by one": lambda y: y.roll(1, 3),
    "not a number": lambda y: y * float("nan"),
    "single precision": lambda y: y.float(),
    "single precision, cast back": lambda y: y.float().double(),
    "a missing row": lambda y: y[:, :, 1:],
    "a shape that would broadcast": lambda y: y[:, :, :1],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checker_refuses(wrong):
    y = random_input(4, (9, 8))
    assert is_equal(y.clone(), y)
    assert not is_equal(WRONG[wrong](y), y)
    with pytest.raises(AssertionError, match=r"shape|dtype|off by"):
        assert_equal(WRONG[wrong](y), y)


def test_the_checker_refuses_a_wrong_small_channel_beside_a_large_one():
    y = random_input(2, (9, 8)) * torch.tensor([1e3, 1.0], dtype=torch.float64).reshape(1, 2, 1, 1)
    wrong = y.clone()
    wrong[:, 1] *= 1 + 1e-10
    assert not is_equal(wrong, y)


def test_the_naive_composition_is_right_inside_and_where_nothing_is_padded():
    """So where it differs, only the border can be the reason."""
    outer, inner = make("dense"), make("strided")
    x = random_input(4, (9, 8))
    naive = naive_composition(outer.torch, inner.torch)
    assert_equal(naive(x, "zeros")[..., 1:-1, 1:-1], outer.torch(inner.torch(x))[..., 1:-1, 1:-1])
    valid = make("dense valid")
    assert_equal(naive_composition(valid.torch, inner.torch)(x, "zeros"), valid.torch(inner.torch(x)))


def test_the_naive_composition_is_wrong_where_a_bias_meets_zero_padding():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    truth = functional.conv2d(torch.ones_like(x), weight, padding=1)
    assert not is_equal(torch.full_like(truth, 9.0), truth)
    assert float(truth[0, 0, 0, 0]) == 4.0
