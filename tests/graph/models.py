"""Small blocks from the papers, written here from their formulas, with norm statistics that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``module`` in eval mode: norms with random statistics, gamma partly negative, one variance tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter[0].numel(), 1) if parameter.ndim else 1
            parameter.normal_(generator=generator).mul_(fan**-0.5)
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                _randomise_norm(layer, generator)
    return module.eval()


def _randomise_norm(layer: _BatchNorm, generator: torch.Generator) -> None:
    if layer.weight is not None:
        layer.weight.uniform_(0.3, 1.5, generator=generator)
        layer.weight[::2].neg_()
        layer.bias.normal_(generator=generator)
    if layer.running_var is not None and layer.running_mean is not None:
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.4, 2.0, generator=generator)
        layer.running_var[0] = 1e-4


class Formula(nn.Module):
    """A forward given as a function of the parts: ``Formula(lambda part, x: part.conv(x), conv=...)``."""

    def __init__(self, formula: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.formula = formula
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def conv(inputs: int, outputs: int, kernel: int | tuple[int, ...] = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the size, unless told otherwise."""
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    dilation = options.get("dilation", 1)
    options.setdefault("padding", tuple((side - 1) * dilation // 2 for side in sides))
    return nn.Conv2d(inputs, outputs, sides, **options)


def conv_bn(inputs: int, outputs: int, kernel: int | tuple[int, ...] = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs))


class RepVGG(nn.Module):
    """Ding et al. 2021: 3x3 + 1x1 + identity, each with its own norm."""

    def __init__(self, inputs: int = 4, outputs: int = 4, stride: int = 1, groups: int = 1, norms: bool = True) -> None:
        super().__init__()
        make = conv_bn if norms else conv
        self.dense = make(inputs, outputs, 3, stride=stride, groups=groups)
        self.pointwise = make(inputs, outputs, 1, stride=stride, groups=groups)
        has_identity = inputs == outputs and stride == 1
        self.identity = (nn.BatchNorm2d(inputs) if norms else nn.Identity()) if has_identity else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.pointwise(x)
        return y if self.identity is None else y + self.identity(x)


class MobileOne(nn.Module):
    """Vasu et al. 2023: several k x k branches, a scale branch and a skip, summed from 0."""

    def __init__(self, channels: int = 4, kernel: int = 3, branches: int = 3, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            conv_bn(channels, channels, kernel, groups=groups, stride=stride) for _ in range(branches)
        )
        self.scale = conv_bn(channels, channels, 1, groups=groups, stride=stride) if kernel > 1 else None
        self.skip = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Any = 0
        if self.skip is not None:
            y = y + self.skip(x)
        if self.scale is not None:
            y = y + self.scale(x)
        for branch in self.convs:
            y = y + branch(x)
        return y  # type: ignore[no-any-return]


class ACNet(nn.Module):
    """Ding et al. 2019: 3x3 + 1x3 + 3x1."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.square = conv_bn(channels, channels, 3)
        self.horizontal = conv_bn(channels, channels, (1, 3))
        self.vertical = conv_bn(channels, channels, (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.horizontal(x) + self.vertical(x)  # type: ignore[no-any-return]


class NormAndPad(nn.Module):
    """DBB's BN-and-pad: what is padded is the norm's own constant, so that the border is no border."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.width = nn.BatchNorm2d(channels), width

    def forward(self, x: Tensor) -> Tensor:
        norm, width = self.norm, self.width
        assert norm.running_mean is not None
        assert norm.running_var is not None
        y = functional.pad(norm(x), [width] * 4)
        value = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        column = value.view(1, -1, 1, 1)
        y[:, :, :width, :] = column
        y[:, :, -width:, :] = column
        y[:, :, :, :width] = column
        y[:, :, :, -width:] = column
        return y


class DiverseBranch(nn.Module):
    """Ding et al. 2021 (DBB): k x k, 1x1, 1x1 -> k x k, 1x1 -> average pool."""

    def __init__(self, channels: int = 4, groups: int = 1) -> None:
        super().__init__()
        self.origin = conv_bn(channels, channels, 3, groups=groups)
        self.pointwise = conv_bn(channels, channels, 1, groups=groups)
        self.deep = nn.Sequential(
            conv(channels, channels, 1, groups=groups, bias=False),
            NormAndPad(channels, 1),
            conv(channels, channels, 3, padding=0, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.pooled = nn.Sequential(
            conv(channels, channels, 1, groups=groups, bias=False),
            NormAndPad(channels, 1),
            nn.AvgPool2d(3, 1, 0),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.origin(x) + self.pointwise(x) + self.deep(x) + self.pooled(x)  # type: ignore[no-any-return]


class RepLK(nn.Module):
    """Ding et al. 2022: a large depthwise kernel beside a small one."""

    def __init__(self, channels: int = 4, large: int = 7, small: int = 3) -> None:
        super().__init__()
        self.large = conv_bn(channels, channels, large, groups=channels)
        self.small = conv_bn(channels, channels, small, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)  # type: ignore[no-any-return]


class UniRepLK(nn.Module):
    """Ding et al. 2024: a large depthwise kernel beside small dilated ones."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.origin = conv_bn(channels, channels, 7, groups=channels)
        self.dilated = nn.ModuleList(
            conv_bn(channels, channels, k, dilation=d, groups=channels) for k, d in ((5, 1), (3, 2), (3, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin(x)
        for branch in self.dilated:
            y = y + branch(x)
        return y  # type: ignore[no-any-return]


class RepViTMixer(nn.Module):
    """Wang et al. 2024 (RepVGGDW): depthwise 3x3 with norm + depthwise 1x1 + identity, one norm after the sum."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, groups=channels)
        self.conv1 = conv(channels, channels, 1, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)  # type: ignore[no-any-return]


class QARepVGG(nn.Module):
    """Chu et al. 2022: 3x3 with norm + alpha * 1x1 + identity, one norm after the sum."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.dense = conv_bn(channels, channels, 3)
        self.pointwise = conv(channels, channels, 1)
        self.alpha = nn.Parameter(torch.ones(1))
        self.post = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.dense(x) + self.alpha * self.pointwise(x) + x)  # type: ignore[no-any-return]


class RepMixer(nn.Module):
    """Vasu et al. 2023 (FastViT): ``x + gamma * (mix(x) - norm(x))``."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.mixer = MobileOne(channels, 3, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.layer_scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * (self.mixer(x) - self.norm(x))  # type: ignore[no-any-return]


class SobelBranch(nn.Module):
    """ECBSR (Zhang et al. 2021): 1x1, padded with its own bias, then a fixed edge kernel with a learned scale."""

    def __init__(self, inputs: int = 4, outputs: int = 4) -> None:
        super().__init__()
        self.dense = conv(inputs, outputs, 3)
        self.first = conv(inputs, outputs, 1)
        self.scale = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        self.bias = nn.Parameter(torch.ones(outputs))
        edge = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("mask", edge.expand(outputs, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pad(self.first(x), (1, 1, 1, 1))
        column = self.first.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
        y[:, :, 0:1, :] = column
        y[:, :, -1:, :] = column
        y[:, :, :, 0:1] = column
        y[:, :, :, -1:] = column
        edges = functional.conv2d(y, self.scale * self.mask, self.bias, groups=self.mask.shape[0])  # type: ignore[operator]
        return self.dense(x) + edges  # type: ignore[no-any-return]


class Collapsible(nn.Module):
    """SESR (Bhardwaj et al. 2022): 3x3 expands, 1x1 projects, beside the identity."""

    def __init__(self, channels: int = 4, wide: int = 8) -> None:
        super().__init__()
        self.expand = conv(channels, wide, 3, bias=False)
        self.project = conv(wide, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.expand(x)) + x  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter (Hu et al. 2021): ``W x + scale * B A x``."""

    def __init__(self, inputs: int = 8, outputs: int = 6, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    """Two norm + linear heads, averaged (LeViT's and RepViT's distilled classifier)."""

    def __init__(self, inputs: int = 8, outputs: int = 5) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)
        self.norm_dist, self.head_dist = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(self.norm(x)) + self.head_dist(self.norm_dist(x))) / 2  # type: ignore[no-any-return]


class TwoInputs(nn.Module):
    """Two inputs by keyword, outputs in a dict; each branch pair is on its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = RepVGG(), RepVGG(stride=2)

    def forward(self, x: Tensor, *, other: Tensor) -> dict[str, Any]:
        return {"left": self.left(x), "pair": [self.right(other).relu(), x]}
