"""Blocks of super-resolution and image restoration nets: edge kernels with learned scales, collapsible chains."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.graph.models import conv, conv_bn

SOBEL_X = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
SOBEL_Y = SOBEL_X.T.contiguous()
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def padded_with(value: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` padded by one with a constant per channel, so that the border is no border."""
    y = functional.pad(x, (1, 1, 1, 1))
    column = value.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = column
    y[:, :, -1:, :] = column
    y[:, :, :, 0:1] = column
    y[:, :, :, -1:] = column
    return y


class EdgeBranch(nn.Module):
    """A 1x1, padded with its bias, then a fixed depthwise edge kernel: ``(scale * mask) * y + bias``."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, edge: Tensor) -> None:
        super().__init__()
        self.first = conv(inputs, outputs, 1)
        self.scale, self.bias = nn.Parameter(torch.ones(outputs, 1, 1, 1)), nn.Parameter(torch.ones(outputs))
        self.register_buffer("mask", edge.expand(outputs, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        assert self.first.bias is not None
        y = padded_with(self.first.bias, self.first(x))
        return functional.conv2d(y, self.scale * self.mask, self.bias, groups=self.mask.shape[0])


class ExpandSqueeze(nn.Module):
    """A 1x1 that widens, padded with its bias, then a 3x3 that narrows."""

    def __init__(self, inputs: int, outputs: int, width: int = 2) -> None:
        super().__init__()
        self.first = conv(inputs, outputs * width, 1)
        self.second = conv(outputs * width, outputs, 3, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        assert self.first.bias is not None
        return self.second(padded_with(self.first.bias, self.first(x)))  # type: ignore[no-any-return]


class EdgeBlock(nn.Module):
    """ECBSR (Zhang et al. 2021): 3x3, 1x1→3x3, 1x1→Sobel-x, 1x1→Sobel-y, 1x1→Laplacian, and the identity."""

    def __init__(self, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__()
        self.dense = conv(inputs, outputs, 3)
        self.deep = ExpandSqueeze(inputs, outputs)
        self.edges = nn.ModuleList(EdgeBranch(inputs, outputs, edge) for edge in (SOBEL_X, SOBEL_Y, LAPLACIAN))
        self.has_identity = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.deep(x)
        for edge in self.edges:
            y = y + edge(x)
        return y + x if self.has_identity else y  # type: ignore[no-any-return]


class CollapsibleNet(nn.Module):
    """SESR (Bhardwaj et al. 2022): 5x5 and 3x3 collapsible blocks (k x k wide, 1x1 narrow), a long residual."""

    def __init__(self, channels: int = 4, wide: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(1, wide, 5, bias=False), conv(wide, channels, 1, bias=False))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(channels, wide, 3, bias=False), conv(wide, channels, 1)) for _ in range(blocks)
        )
        self.acts = nn.ModuleList(nn.PReLU(channels) for _ in range(blocks + 1))
        self.last = nn.Sequential(conv(channels, wide, 5, bias=False), conv(wide, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.acts[0](self.first(x))
        y = first
        for block, act in zip(self.blocks, list(self.acts)[1:], strict=True):
            y = act(block(y) + y)
        return functional.pixel_shuffle(self.last(y + first), 2)


class PlainChain(nn.Module):
    """A long linear chain (ExpandNets, Guo et al. 2020): 1x1 → k x k → 1x1 → 1x1, all but one pointwise."""

    def __init__(self, channels: int = 4, wide: int = 12) -> None:
        super().__init__()
        self.chain = nn.Sequential(
            conv(channels, wide, 1, bias=False),
            conv(wide, wide, 3, bias=False),
            conv(wide, wide, 1),
            nn.BatchNorm2d(wide),
            conv(wide, wide, 1),
            conv(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)  # type: ignore[no-any-return]


class RepSR(nn.Module):
    """Wang et al. 2022: 3x3→1x1 branches with frozen norms inside, padded at the input, and the identity."""

    def __init__(self, channels: int = 4, wide: int = 8) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_bn(channels, wide, 3, padding=0), nn.BatchNorm2d(wide), conv(wide, channels, 1, padding=0)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (1, 1, 1, 1))
        return self.branches[0](padded) + self.branches[1](padded) + x  # type: ignore[no-any-return]
