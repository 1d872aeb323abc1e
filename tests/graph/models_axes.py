"""The blocks in one and three dimensions, and on tokens: the same formulas with other axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv_norm(
    dims: int, inputs: int, outputs: int, kernel: tuple[int, ...], stride: int = 1, groups: int = 1
) -> nn.Module:
    padding = tuple(side // 2 for side in kernel)
    layer = CONVOLUTIONS[dims](inputs, outputs, kernel, stride, padding, groups=groups, bias=False)  # type: ignore[arg-type]
    return nn.Sequential(layer, NORMS[dims](outputs))


class RepAnyD(nn.Module):
    """RepVGG's branches over ``dims`` axes."""

    def __init__(self, dims: int, channels: int = 4, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.dense = conv_norm(dims, channels, channels, (3,) * dims, stride, groups)
        self.pointwise = conv_norm(dims, channels, channels, (1,) * dims, stride, groups)
        self.identity = NORMS[dims](channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return y if self.identity is None else y + self.identity(x)  # type: ignore[no-any-return]


class AsymmetricAnyD(nn.Module):
    """ACNet's branches over ``dims`` axes: the whole kernel, and one line along each axis."""

    def __init__(self, dims: int, channels: int = 4, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        kernels = [(kernel,) * dims, *(tuple(kernel if a == b else 1 for b in range(dims)) for a in range(dims))]
        self.branches = nn.ModuleList(conv_norm(dims, channels, channels, k, stride, groups) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            y = y + branch(x)
        return y  # type: ignore[no-any-return]


class PooledAnyD(nn.Module):
    """DBB's pooled branch without its norm in between, over ``dims`` axes: 1x1 → average, beside the whole kernel."""

    def __init__(self, dims: int, channels: int = 4) -> None:
        super().__init__()
        self.origin = conv_norm(dims, channels, channels, (3,) * dims)
        self.first = CONVOLUTIONS[dims](channels, channels, 1, bias=False)
        self.pool, self.norm = POOLS[dims](3, 1, 1), NORMS[dims](channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.norm(self.pool(self.first(x)))  # type: ignore[no-any-return]


class Mixer1d(nn.Module):
    """A token mixer over a sequence: ``x + gamma * (dw(x) + dw1(x) - norm(x))``, with several kernel sizes."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.large = conv_norm(1, channels, channels, (7,), groups=channels)
        self.small = conv_norm(1, channels, channels, (3,), groups=channels)
        self.norm = nn.BatchNorm1d(channels)
        self.gamma = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.large(x) + self.small(x) - self.norm(x))  # type: ignore[no-any-return]


class ConvInLinear(nn.Module):
    """RepMLP's idea (Ding et al. 2021) where it is exact: ``fc(flatten(x)) + flatten(norm(conv(x)))`` is one layer."""

    def __init__(self, channels: int = 2, sizes: tuple[int, int] = (4, 3)) -> None:
        super().__init__()
        values = channels * sizes[0] * sizes[1]
        self.fc = nn.Linear(values, values)
        self.conv = conv_norm(2, channels, channels, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) + self.conv(x).flatten(1)  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """A linear layer over the channels moved last, beside a 1x1 convolution: MetaFormers write both."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(channels, channels), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + self.conv(x)  # type: ignore[no-any-return]
