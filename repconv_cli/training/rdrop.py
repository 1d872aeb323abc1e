"""R-Drop: train a network so that two dropout masks give one answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repconv_cli.errors import InputError


class RDropLoss(NamedTuple):
    """The R-Drop loss and its two parts, scalars that carry gradients: ``total = cross_entropy + alpha * kl``."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def rdrop_loss(logits_1: Tensor, logits_2: Tensor, target: Tensor, alpha: float) -> RDropLoss:
    """Return the mean R-Drop loss of two passes of one batch, with its two parts.

    With ``p_j = softmax(logits_j)`` and ``y`` the target class, averaged over the batch::

        cross_entropy = -log p_1[y] - log p_2[y]
        kl            = (KL(p_1 || p_2) + KL(p_2 || p_1)) / 2
        total         = cross_entropy + alpha * kl

    Gradients flow through both passes. At ``alpha = 0`` this is the loss of two plain dropout passes.

    Shapes: ``logits_1, logits_2 (N, C)`` of one floating dtype, ``target (N,)`` int64; each part ``()``.

    Raises:
        InputError: a shape differs from these, the batch is empty, or ``alpha`` is negative.

    Reference:
        Wu et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021, equations 2 to 4.

    Example:
        >>> even, sure = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]])
        >>> loss = rdrop_loss(even, sure, torch.tensor([1]), alpha=2.0)
        >>> [round(part.item(), 4) for part in loss]
        [2.0995, 0.7417, 0.6789]
    """
    _check_logits(logits_1, logits_2)
    if target.shape != logits_1.shape[:1]:
        raise InputError(f"target of shape {tuple(target.shape)}", needed=f"({logits_1.shape[0]},), one class a row")
    if alpha < 0:
        raise InputError(f"alpha is {alpha}", needed="at least 0")
    cross_entropy = F.cross_entropy(logits_1, target) + F.cross_entropy(logits_2, target)
    kl = symmetric_kl(logits_1, logits_2)
    return RDropLoss(cross_entropy + alpha * kl, cross_entropy, kl)


def symmetric_kl(logits_1: Tensor, logits_2: Tensor) -> Tensor:
    """Return the mean over the batch of ``(KL(p_1 || p_2) + KL(p_2 || p_1)) / 2``, in nats.

    The two divergences share their terms, so that with ``p_j = softmax(logits_j)``::

        kl = sum_c (p_1 - p_2) (log p_1 - log p_2) / 2

    Shapes: ``logits_1, logits_2 (N, C)``; the result ``()``. It is never negative, and 0 for equal distributions.

    Raises:
        InputError: the shapes are not one ``(N, C)``, or the batch is empty.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0]])
        >>> symmetric_kl(logits, logits + 5.0).item()
        0.0
    """
    _check_logits(logits_1, logits_2)
    log_1, log_2 = F.log_softmax(logits_1, dim=-1), F.log_softmax(logits_2, dim=-1)
    return ((log_1.exp() - log_2.exp()) * (log_1 - log_2)).sum(dim=-1).mean() / 2


def two_passes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of two passes of ``x`` through ``model``, in the mode it is in.

    The batch is doubled and goes through once, so every element meets two independent dropout masks. A batch norm in
    training mode then normalises both passes with the same statistics, those of the doubled batch, and updates its
    running ones once: what differs between the passes is dropout alone.

    Shapes: ``x (N, ...)``, each result ``(N, C)``, both views of one tensor.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)).train()
        >>> first, second = two_passes(model, torch.ones(4, 8))
        >>> first.shape, torch.equal(first, second)
        (torch.Size([4, 3]), False)
    """
    first, second = model(torch.cat([x, x])).chunk(2)
    return first, second


def mean_symmetric_kl(model: nn.Module, x: Tensor, pairs: int = 10) -> float:
    """Return the symmetric KL between two dropout passes of ``x``, averaged over ``pairs`` of passes, in nats.

    Batch norms are in eval mode and all else in training mode meanwhile; every module gets its own mode back.
    The masks come from torch's global generator: seed it for a figure that repeats.

    Shapes: ``x (N, ...)``, on which ``model`` gives logits ``(N, C)``.

    Raises:
        InputError: ``pairs`` is under 1, or the model's output is not ``(N, C)``.

    Example:
        >>> mean_symmetric_kl(nn.Linear(4, 2), torch.ones(3, 4), pairs=2)  # no dropout, no divergence
        0.0
    """
    if pairs < 1:
        raise InputError(f"pairs is {pairs}", needed="at least 1")
    with torch.no_grad(), dropout_active(model):
        divergences = [symmetric_kl(model(x), model(x)).item() for _ in range(pairs)]
    return sum(divergences) / pairs


@contextmanager
def dropout_active(model: nn.Module) -> Iterator[None]:
    """Put batch norms in eval mode and every other module in training mode, and restore each module's mode after."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_logits(logits_1: Tensor, logits_2: Tensor) -> None:
    if logits_1.shape != logits_2.shape or logits_1.ndim != 2 or logits_1.shape[0] == 0:
        raise InputError(
            f"logits of shapes {tuple(logits_1.shape)} and {tuple(logits_2.shape)}",
            needed="one shape (N, C) with N at least 1",
        )
