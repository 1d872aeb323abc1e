"""Dropout as first published: masked in training, scaled at test time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repconv_cli.errors import InputError


class ScaledDropout(nn.Module):
    """Return the input with a share of its elements set to zero in training, and scaled by the share kept at test time.

    With r the ratio and u uniform on [0, 1), drawn for each element from torch's global generator::

        training:  y = x * (u > r)
        eval:      y = x * (1 - r)

    :class:`torch.nn.Dropout` divides by ``1 - r`` in training instead and does nothing at test time. Here the test-time
    scale stays in the network, where it is a per-channel scale like any other and folds into a neighbouring conv.

    Shapes: ``x`` of any shape and floating dtype; ``y`` alike, a new tensor.

    Raises:
        InputError: ``ratio`` is not in [0, 1).

    Reference:
        Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 2014, section 4.

    Example:
        >>> layer = ScaledDropout(0.25)
        >>> layer.eval()(torch.full((2,), 4.0))
        tensor([3., 3.])
        >>> set(layer.train()(torch.full((64,), 4.0)).tolist()) <= {0.0, 4.0}
        True
    """

    def __init__(self, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            raise InputError(f"dropout ratio {ratio}", needed="at least 0 and under 1")
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` masked (training) or scaled (eval)."""
        if self.training:
            return x * (torch.rand_like(x, dtype=torch.float32) > self.ratio)
        return x * (1.0 - self.ratio)

    def extra_repr(self) -> str:
        """Return the ratio, for ``repr``."""
        return f"ratio={self.ratio}"
