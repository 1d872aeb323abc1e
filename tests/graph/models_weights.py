"""Convolutions whose weight is computed from parameters alone: one kernel already, but no converter sees it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.graph.models import conv


def frequency_prior(channels: int, kernel: int) -> Tensor:
    """Return OREPA's frozen filters: half of the channels vary in height, half in width, by cosines."""
    filters = torch.empty(channels, kernel, kernel)
    half = channels // 2
    for index in range(channels):
        for row in range(kernel):
            for column in range(kernel):
                place, order = (row, index + 1) if index < half else (column, index + 1 - half)
                filters[index, row, column] = math.cos(math.pi * (place + 0.5) * order / kernel)
    return filters


class OnlineRep(nn.Module):
    """OREPA (Hu et al. 2022): every branch squeezed into one weight while training, each scaled per channel.

    ``W = s0 W0 + s1 (V1 A) + s2 (V2 P) + s3 (W3 ∘ V3) + s4 (D V4)``: origin, 1x1 with the frozen average, 1x1 with
    the frozen frequency prior, 1x1→k x k, depthwise-separable.
    """

    average: Tensor
    prior: Tensor

    def __init__(self, channels: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.origin = nn.Parameter(torch.zeros(channels, channels, kernel, kernel))
        self.to_average, self.to_prior, self.inner, self.point = (
            nn.Parameter(torch.zeros(channels, channels)) for _ in range(4)
        )
        self.outer = nn.Parameter(torch.zeros(channels, channels, kernel, kernel))
        self.depthwise = nn.Parameter(torch.zeros(channels, kernel, kernel))
        self.scales = nn.Parameter(torch.ones(5, channels))
        self.register_buffer("average", torch.full((kernel, kernel), 1.0 / kernel**2))
        self.register_buffer("prior", frequency_prior(channels, kernel))
        self.norm = nn.BatchNorm2d(channels)

    def weight(self) -> Tensor:
        parts = (
            self.origin,
            torch.einsum("oi,hw->oihw", self.to_average, self.average),
            torch.einsum("oi,ihw->oihw", self.to_prior, self.prior),
            torch.einsum("ti,othw->oihw", self.inner, self.outer),
            torch.einsum("ihw,oi->oihw", self.depthwise, self.point),
        )
        return sum(torch.einsum("oihw,o->oihw", p, s) for p, s in zip(parts, self.scales, strict=True))  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.conv2d(x, self.weight(), padding=1))  # type: ignore[no-any-return]


class FrozenBranches(nn.Module):
    """OREPA's branches before they are squeezed: frozen filters as layers, a learned scale where norms were."""

    prior: Tensor

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.dense = conv(channels, channels, 3, bias=False)
        self.to_prior = conv(channels, channels, 1, bias=False)
        self.to_average = conv(channels, channels, 1, bias=False)
        self.average = nn.AvgPool2d(3, 1, 1)
        self.scales = nn.Parameter(torch.ones(3, channels, 1, 1))
        self.register_buffer("prior", frequency_prior(channels, 3).unsqueeze(1))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        filtered = functional.conv2d(self.to_prior(x), self.prior, padding=1, groups=self.prior.shape[0])
        pooled = self.average(self.to_average(x))
        return self.norm(self.dense(x) * self.scales[0] + filtered * self.scales[1] + pooled * self.scales[2])  # type: ignore[no-any-return]


class DepthwiseOver(nn.Module):
    """DO-Conv (Cao et al. 2020): ``W' = (D + I) ∘ W``, a depthwise kernel composed into a dense one by einsum."""

    eye: Tensor

    def __init__(self, inputs: int = 4, outputs: int = 6, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        area = kernel**2
        self.kernel, self.groups = kernel, groups
        self.dense = nn.Parameter(torch.zeros(outputs, inputs // groups, area))
        self.over = nn.Parameter(torch.zeros(inputs, area, area))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("eye", torch.eye(area).expand(inputs, area, area).clone())

    def forward(self, x: Tensor) -> Tensor:
        over = (self.over + self.eye).view(self.groups, -1, *self.over.shape[1:])
        dense = self.dense.view(self.groups, -1, *self.dense.shape[1:])
        weight = torch.einsum("gims,gois->goim", over, dense)
        return functional.conv2d(
            x, weight.reshape(-1, weight.shape[2], self.kernel, self.kernel), self.bias, padding=1, groups=self.groups
        )


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019): each filter has zero mean and unit deviation, times a learned gain."""

    def __init__(self, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return self._conv_forward(x, self.gain * (self.weight - mean) / torch.sqrt(variance + 1e-6), self.bias)


class StandardisedByNorm(nn.Conv2d):
    """The same through batch norm *of the weight*, as timm's: its own statistics, but of a constant."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class CentralDifference(nn.Module):
    """Pixel difference nets (Su et al. 2021): ``conv(x, W) - theta * conv(x, sum of W)``, the second of 1x1."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.theta = conv(channels, channels, 3, bias=False), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        centre = self.conv.weight.sum((2, 3), keepdim=True)
        return self.conv(x) - self.theta * functional.conv2d(x, centre)  # type: ignore[no-any-return]


class RadialDifference(nn.Module):
    """DEA-Net (Chen et al. 2023): kernels made by moving weights about, beside a plain one, on one input."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.plain = conv(channels, channels, 3)
        self.angular, self.horizontal = (nn.Parameter(torch.zeros(channels, channels, 3, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.angular.flatten(2)
        angular = (flat - flat[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]).view_as(self.angular)
        horizontal = torch.cat([self.horizontal[..., :1], 0 * self.horizontal[..., :1], -self.horizontal[..., :1]], -1)
        return self.plain(x) + functional.conv2d(x, angular, padding=1) + functional.conv2d(x, horizontal, padding=1)  # type: ignore[no-any-return]


class MaskedWeight(nn.Conv2d):
    """A pruned convolution: a fixed mask over the weight (also PixelCNN's causal kernels)."""

    mask: Tensor

    def __init__(self, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 2:], mask[2] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)
