"""Small mobile blocks from the papers: ghost features, learned affine layers, positional and partial convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.graph.models import MobileOne, conv, conv_bn


class RepGhost(nn.Module):
    """Chen et al. 2022: ``relu(norm(dw(y)) + norm(y))`` with ``y = relu(norm(1x1(x)))``; a sum instead of a cat."""

    def __init__(self, inputs: int = 4, outputs: int = 6) -> None:
        super().__init__()
        self.primary = conv_bn(inputs, outputs, 1)
        self.cheap = conv_bn(outputs, outputs, 3, groups=outputs)
        self.identity = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x).relu()
        return (self.cheap(y) + self.identity(y)).relu()


class GhostV3(nn.Module):
    """Liu et al. 2024: ghost features where the 1x1 and the depthwise 3x3 are trained as several branches each."""

    def __init__(self, channels: int = 4, branches: int = 3) -> None:
        super().__init__()
        self.primary = MobileOne(channels, 1, branches)
        self.cheap = MobileOne(channels, 3, branches, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary(x).relu()
        return torch.cat([first, self.cheap(first).relu()], 1)


class MobileOneStage(nn.Module):
    """Vasu et al. 2023: a depthwise block, then a pointwise one, an activation after each."""

    def __init__(self, channels: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = MobileOne(channels, 3, 4, groups=channels, stride=stride)
        self.pointwise = MobileOne(channels, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x).relu()).relu()  # type: ignore[no-any-return]


class PositionalConv(nn.Module):
    """The conditional positional encoding of FastViT, CPVT and Twins: ``x + dw(x)``, 7x7 in FastViT."""

    def __init__(self, channels: int = 4, kernel: int = 7) -> None:
        super().__init__()
        self.proj = conv(channels, channels, kernel, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)  # type: ignore[no-any-return]


class TokenPositionalConv(nn.Module):
    """The same on tokens (CoaT, Twins): reshaped to an image, convolved and flattened again."""

    def __init__(self, channels: int = 4, sizes: tuple[int, int] = (5, 6)) -> None:
        super().__init__()
        self.proj, self.sizes = conv(channels, channels, 3, groups=channels), sizes

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *self.sizes)
        return (self.proj(image) + image).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class LearnableAffine(nn.Module):
    """PP-LCNetV3's learnable affine layer: one scale and one bias for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class LearnableRep(nn.Module):
    """PP-LCNetV3 (Cui et al. 2023): k x k branches, a 1x1 and an identity, then an affine layer of two numbers."""

    def __init__(self, channels: int = 4, kernel: int = 3, branches: int = 4, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.rep = MobileOne(channels, kernel, branches, groups, stride)
        self.lab = LearnableAffine()

    def forward(self, x: Tensor) -> Tensor:
        return self.lab(self.rep(x))  # type: ignore[no-any-return]


class LearnableRepStage(nn.Module):
    """The whole block of PP-LCNetV3: an affine layer also *after* the activation, before the next convolution."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.depthwise = LearnableRep(channels, groups=channels)
        self.after_activation = LearnableAffine()
        self.pointwise = LearnableRep(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.after_activation(nn.functional.hardswish(self.depthwise(x))))  # type: ignore[no-any-return]


class PlusZero(nn.Module):
    """A YOLO's RepConv where there is no identity: ``norm(3x3(x)) + norm(1x1(x)) + 0``."""

    def __init__(self, inputs: int = 4, outputs: int = 6, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride=stride)
        self.conv2 = conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = 0
        return torch.nn.functional.silu(self.conv1(x) + self.conv2(x) + identity)


class ParallelGroups(nn.Module):
    """MixConv (Tan & Le 2019): each part of the channels has a depthwise kernel of its own size."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        third = channels // 3
        self.parts = nn.ModuleList(conv(third, third, k, groups=third, bias=False) for k in (3, 5, 5))
        self.norm = nn.BatchNorm2d(channels)
        self.third = third

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.third, 1)
        return self.norm(torch.cat([layer(part) for layer, part in zip(self.parts, parts, strict=True)], 1))  # type: ignore[no-any-return]


class Inception(nn.Module):
    """InceptionNeXt (Yu et al. 2023): square, horizontal and vertical depthwise kernels on parts, the rest as it is."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        part = channels // 4
        self.square = conv(part, part, 3, groups=part)
        self.horizontal = conv(part, part, (1, 5), groups=part)
        self.vertical = conv(part, part, (5, 1), groups=part)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        rest, a, b, c = x.chunk(4, 1)
        return self.norm(torch.cat([rest, self.square(a), self.horizontal(b), self.vertical(c)], 1))  # type: ignore[no-any-return]
