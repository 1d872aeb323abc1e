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


class KeepsBias(nn.Module):
    """An attention that keeps its bias by device, in a dict, as LeViT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4))
        self.places = torch.arange(4)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.bias[self.places]
            self.seen.append(self.cache[key])
        return x + self.cache[key]


def test_what_a_forward_keeps_in_a_dict_is_not_left_behind_by_a_trace() -> None:
    model = KeepsBias().eval()
    cache, bias = model.cache, model.bias
    trace(model, (torch.zeros(2, 4),))
    assert model.cache is cache
    assert cache == {}
    assert model.seen == []
    assert model.bias is bias
    assert list(model.state_dict()) == ["bias"]
    assert type(model(torch.zeros(2, 4))) is Tensor


def test_what_was_kept_before_is_still_there() -> None:
    model = KeepsBias().eval()
    model(torch.zeros(2, 4))
    kept = model.cache["cpu"]
    trace(model, (torch.zeros(2, 4),))
    assert model.cache["cpu"] is kept


class KeepsStrides(KeepsGrid):
    """A head that makes its grid with a number that it reads from a tensor, as YOLO's does."""

    def __init__(self) -> None:
        super().__init__()
        self.strides = torch.tensor([8.0, 16.0])

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.full((y.shape[-1],), self.strides[1])  # type: ignore[call-overload]


def test_a_number_read_from_a_tensor_does_not_keep_a_shape_from_being_guessed() -> None:
    model = KeepsStrides()
    assert guess_shape(model, torch.float32, 1 << 20) == (2, 3, 224, 224)
    assert float(model(torch.zeros(1, 3, 8, 8)).detach().abs().max()) > 0
