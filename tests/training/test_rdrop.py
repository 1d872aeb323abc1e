"""The R-Drop loss against a plain NumPy computation, and what is measured with it."""

import numpy as np
import pytest
import torch
from torch import nn

from repconv_cli.errors import InputError
from repconv_cli.training import (
    RepConv,
    ScaledDropout,
    dropout_active,
    mean_symmetric_kl,
    rdrop_loss,
    symmetric_kl,
    two_passes,
)


def numpy_parts(logits_1, logits_2, target):
    """Softmax, logarithm and sums as the equations are written, row by row."""
    cross_entropy, kl = [], []
    for row_1, row_2, label in zip(logits_1, logits_2, target, strict=True):
        p = np.exp(row_1 - row_1.max()) / np.exp(row_1 - row_1.max()).sum()
        q = np.exp(row_2 - row_2.max()) / np.exp(row_2 - row_2.max()).sum()
        cross_entropy.append(-np.log(p[label]) - np.log(q[label]))
        kl.append((np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))) / 2)
    return np.mean(cross_entropy), np.mean(kl)


def logits(rows, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = scale * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return first, second, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 5.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 10), (32, 3)])
def test_loss_is_the_plain_computation(rows, classes, scale, alpha):
    first, second, target = logits(rows, classes, scale, seed=rows)
    cross_entropy, kl = numpy_parts(first.numpy(), second.numpy(), target.numpy())
    loss = rdrop_loss(first, second, target, alpha)
    assert loss.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-12)
    assert loss.kl.item() == pytest.approx(kl, rel=1e-11)
    assert loss.total.item() == pytest.approx(cross_entropy + alpha * kl, rel=1e-12)


def test_gradients_flow_through_both_passes_and_are_right():
    first, second, target = logits(3, 4, 1.0, seed=0)
    first.requires_grad_()
    second.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rdrop_loss(a, b, target, 2.0).total, (first, second))
    rdrop_loss(first, second, target, 2.0).kl.backward()
    assert first.grad.abs().max() > 0.01
    assert second.grad.abs().max() > 0.01


def test_kl_is_symmetric_positive_and_blind_to_a_shift_of_the_logits():
    first, second, _ = logits(5, 4, 2.0, seed=1)
    assert symmetric_kl(first, second) > 0
    assert torch.equal(symmetric_kl(first, second), symmetric_kl(second, first))
    torch.testing.assert_close(symmetric_kl(first + 9, second - 4), symmetric_kl(first, second), rtol=1e-12, atol=0)


def test_certain_and_opposite_answers_give_a_finite_loss():
    """The softmax of one is exactly 0 where the other's is 1: p log(p / q) would be infinite."""
    first = torch.tensor([[5000.0, 0.0]])
    loss = rdrop_loss(first, -first, torch.tensor([0]), alpha=1.0)
    assert [part.item() for part in loss] == [10000.0, 5000.0, 5000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_keeps_the_dtype_of_the_logits(dtype):
    first, second, target = logits(3, 4, 1.0, seed=0)
    assert {part.dtype for part in rdrop_loss(first.to(dtype), second.to(dtype), target, 1.0)} == {dtype}


@pytest.mark.parametrize(
    ("first", "second", "target", "alpha", "reason"),
    [
        ((3, 4), (3, 5), (3,), 1.0, r"logits of shapes \(3, 4\) and \(3, 5\); needed: one shape \(N, C\)"),
        ((1, 4), (3, 4), (3,), 1.0, r"logits of shapes \(1, 4\) and \(3, 4\)"),
        ((4,), (4,), (4,), 1.0, r"logits of shapes \(4,\) and \(4,\)"),
        ((0, 4), (0, 4), (0,), 1.0, "with N at least 1"),
        ((3, 4), (3, 4), (2,), 1.0, r"target of shape \(2,\); needed: \(3,\), one class a row"),
        ((3, 4), (3, 4), (3, 1), 1.0, r"target of shape \(3, 1\)"),
        ((3, 4), (3, 4), (3,), -1.0, "alpha is -1.0; needed: at least 0"),
    ],
)
def test_shapes_that_would_broadcast_or_mean_nothing_are_refused(first, second, target, alpha, reason):
    with pytest.raises(InputError, match=reason):
        rdrop_loss(torch.zeros(first), torch.zeros(second), torch.zeros(target, dtype=torch.int64), alpha)


def network(dropout):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), dropout, nn.Linear(4, 3)]
    return nn.Sequential(RepConv(1, 4), nn.ReLU(), dropout, RepConv(4, 4), nn.ReLU(), *head).double()


DROPOUTS = [nn.Dropout, ScaledDropout]
IMAGES = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_kl_is_zero_and_the_loss_twice_the_cross_entropy_when_dropout_is_off(dropout):
    """Off by its ratio with batch norms in training mode, and off by eval mode."""
    for model in (network(dropout(0.0)).train(), network(dropout(0.5)).eval()):
        first, second = two_passes(model, IMAGES)
        loss = rdrop_loss(first, second, LABELS, alpha=100.0)
        assert loss.kl.item() < 1e-25
        assert loss.total.item() == pytest.approx(2 * nn.functional.cross_entropy(first, LABELS).item(), rel=1e-12)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_kl_is_positive_when_dropout_is_on(dropout):
    model = network(dropout(0.5)).train()
    assert rdrop_loss(*two_passes(model, IMAGES), LABELS, alpha=1.0).kl > 1e-4


def test_two_passes_update_running_statistics_once():
    model = network(nn.Dropout(0.5)).train()
    two_passes(model, IMAGES)
    assert {key: value.item() for key, value in model.state_dict().items() if key.endswith("tracked")} == dict.fromkeys(
        [key for key in model.state_dict() if key.endswith("tracked")], 1
    )


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_mean_kl_is_the_average_over_pairs_of_passes(dropout):
    model = network(dropout(0.5))
    torch.manual_seed(5)
    measured = mean_symmetric_kl(model, IMAGES, pairs=3)
    model.eval()
    for layer in model:
        layer.train(isinstance(layer, dropout))
    torch.manual_seed(5)
    pairs = [(model(IMAGES).detach().numpy(), model(IMAGES).detach().numpy()) for _ in range(3)]
    assert measured == pytest.approx(np.mean([numpy_parts(*pair, LABELS.numpy())[1] for pair in pairs]), rel=1e-10)
    assert measured > 1e-4


def test_mean_kl_is_exactly_zero_without_dropout():
    assert mean_symmetric_kl(network(nn.Dropout(0.0)), IMAGES) == 0.0


def test_mean_kl_leaves_modes_and_statistics_as_they_were():
    model = network(nn.Dropout(0.5)).train()
    model[3].convs.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    mean_symmetric_kl(model, IMAGES)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_modes_come_back_after_an_error_too():
    model = network(nn.Dropout(0.5)).eval()
    with pytest.raises(RuntimeError, match="channels"):
        mean_symmetric_kl(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    assert not any(module.training for module in model.modules())


def test_meanwhile_norms_are_in_eval_mode_and_all_else_in_training_mode():
    model = network(nn.Dropout(0.5)).eval()
    with dropout_active(model):
        assert all(module.training is not isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_no_pairs_at_all_are_refused():
    with pytest.raises(InputError, match="pairs is 0; needed: at least 1"):
        mean_symmetric_kl(nn.Linear(1, 2), torch.ones(1, 1), pairs=0)
