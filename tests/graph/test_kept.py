"""A module that is traced comes back as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repconv_cli.graph.inputs import guess_shape
from repconv_cli.graph.trace import trace


class KeepsGrid(nn.Module):
    """A head that keeps a grid for the last size it has seen, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.size: object = None
        self.grid = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.size != y.shape:
            self.size = y.shape
            self.grid = torch.arange(y.shape[-1]).to(y.dtype)
        return y + self.grid


def test_what_a_forward_keeps_is_not_left_behind_by_a_trace() -> None:
    model = KeepsGrid()
    grid = model.grid
    trace(model, (torch.zeros(2, 3, 8, 8),))
    guess_shape(model, torch.float32, 1 << 20)
    assert model.size is None
    assert model.grid is grid
    assert model.training
    assert model(torch.zeros(1, 3, 9, 9)).shape == (1, 4, 7, 7)
