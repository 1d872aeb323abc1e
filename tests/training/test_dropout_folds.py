"""The test-time scale of the seed's dropout is a scale like any other: it folds into the conv before or after it."""

import pytest
import torch
from torch import nn

from repconv_cli.algebra import compose, fold, layer_map, scale_map
from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.trace import trace
from repconv_cli.training import ScaledDropout

RATIO = 0.3


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 3, padding=1, groups=1).double()


def scale(channels):
    return torch.full((channels,), 1.0 - RATIO, dtype=torch.float64)


def test_the_scale_folds_into_the_conv_before_it(conv):
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = ScaledDropout(RATIO).eval()(conv(x))
    torch.testing.assert_close(fold(layer_map(conv), scale(5))(x), expected, rtol=1e-12, atol=1e-12)


def test_the_scale_folds_into_the_conv_after_it(conv):
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = conv(ScaledDropout(RATIO).eval()(x))
    folded = compose(layer_map(conv), scale_map(scale(3)))
    torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.weight, (1.0 - RATIO) * conv.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("comes_first", [True, False])
def test_the_plan_folds_it_from_either_side(conv, comes_first):
    dropout = ScaledDropout(RATIO)
    model = nn.Sequential(dropout, conv) if comes_first else nn.Sequential(conv, dropout)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    program = trace(model, (x,))
    fused = fuse_program(program, [(x,)])
    assert count_ops(program)["ops"] == 2
    assert count_ops(fused.program)["ops"] == 1
