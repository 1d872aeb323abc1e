"""A small, repeatable training loop with the R-Drop loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repconv_cli.errors import InputError
from repconv_cli.training.rdrop import rdrop_loss, two_passes


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> list[float]:
    """Train ``model`` in place with R-Drop and return the mean loss of each epoch.

    AdamW under a one-cycle schedule that peaks at ``learning_rate``; each epoch is a new order of the examples, and the
    incomplete batch at its end is left out. ``seed`` fixes the order and the dropout masks (it seeds torch's global
    generator), so on one machine, with one torch and one thread, the same call gives the same weights bit for bit.

    Shapes: ``images (N, ...)``, ``labels (N,)`` int64, logits ``(batch_size, C)``. The model is left in training mode.

    Raises:
        InputError: there are fewer than ``batch_size`` examples, or not one label each.

    Reference:
        Wu et al., "R-Drop: Regularized Dropout for Neural Networks", NeurIPS 2021, algorithm 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
        >>> images = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> losses = fit(model, images, (images[:, 0] > 0).long(), alpha=1.0, epochs=20, batch_size=16)
        >>> losses[-1] < losses[0]
        True
    """
    if len(images) != len(labels) or len(images) < batch_size:
        raise InputError(
            f"{len(images)} images and {len(labels)} labels", needed=f"as many of each, and at least {batch_size}"
        )
    steps = len(images) // batch_size
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=epochs * steps)
    model.train()
    history = []
    for _ in range(epochs):
        epoch_loss = 0.0
        for batch in torch.randperm(len(images))[: steps * batch_size].view(steps, batch_size):
            loss = rdrop_loss(*two_passes(model, images[batch]), labels[batch], alpha).total
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            epoch_loss += loss.item()
        history.append(epoch_loss / steps)
    return history
