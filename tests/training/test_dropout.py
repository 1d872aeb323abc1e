"""ScaledDropout against the NumPy formulation it reproduces."""

import numpy as np
import pytest
import torch

from repconv_cli.errors import InputError
from repconv_cli.training import ScaledDropout


def numpy_dropout(x, uniform, ratio, *, is_training):
    """Mask in training, multiply by what is kept on average at test time."""
    if is_training:
        return x * (uniform > ratio)
    return x * (1.0 - ratio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.9])
def test_training_masks_without_rescaling(ratio, dtype):
    x = torch.randn(8, 5, 4, 4).to(dtype)
    torch.manual_seed(3)
    uniform = torch.rand(x.shape).numpy()
    torch.manual_seed(3)
    y = ScaledDropout(ratio).train()(x)
    assert y.dtype == dtype
    assert np.array_equal(y.numpy(), numpy_dropout(x.numpy(), uniform, ratio, is_training=True))


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.9])
def test_eval_multiplies_by_the_share_kept(ratio):
    x = torch.randn(8, 5, dtype=torch.float64)
    y = ScaledDropout(ratio).eval()(x)
    assert np.array_equal(y.numpy(), numpy_dropout(x.numpy(), None, ratio, is_training=False))


def test_the_mean_of_training_is_the_eval_output():
    torch.manual_seed(0)
    layer, x, draws = ScaledDropout(0.3), torch.tensor([2.0, -1.0], dtype=torch.float64), 40_000
    mean = layer.train()(x.expand(draws, 2)).mean(dim=0)
    five_sigma = 5 * x.abs() * (0.3 * 0.7 / draws) ** 0.5
    assert ((mean - layer.eval()(x)).abs() < five_sigma).all()


def test_dropped_elements_carry_no_gradient():
    torch.manual_seed(0)
    x = torch.ones(100, requires_grad=True)
    y = ScaledDropout(0.5).train()(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert 0 < int(y.detach().sum()) < 100


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(InputError, match=f"dropout ratio {ratio}; needed: at least 0 and under 1"):
        ScaledDropout(ratio)
