"""Blocks whose branches meet in a fully connected layer over all values of an image, or of a partition of it."""

from __future__ import annotations

from torch import Tensor, nn

from tests.graph.models import conv, conv_bn


class LocalPerceptron(nn.Module):
    """The heart of RepMLP: a fully connected layer over (channel, position), beside convolutions on the same input."""

    def __init__(self, inputs: int = 4, outputs: int = 4, height: int = 5, width: int = 6, *kernels: int) -> None:
        super().__init__()
        self.outputs, self.height, self.width = outputs, height, width
        self.full = nn.Linear(inputs * height * width, outputs * height * width)
        self.branches = nn.ModuleList(conv_bn(inputs, outputs, kernel) for kernel in kernels or (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.full(x.flatten(1)).reshape(x.shape[0], self.outputs, self.height, self.width)
        for branch in self.branches:
            y = y + branch(x)
        return y


class RepMLP(nn.Module):
    """Ding et al. 2021, *RepMLP*, figure 2: what each partition is, less its mean over channels and positions.

    The global perceptron adds to each partition what two linear layers make of the partitions' means; the partition
    perceptron is a grouped 1x1 on the flattened partition with a norm; the local one convolves the partition.
    """

    def __init__(
        self,
        inputs: int = 4,
        outputs: int = 4,
        size: tuple[int, int] = (6, 8),
        part: tuple[int, int] = (3, 4),
        kernels: tuple[int, ...] = (1, 3),
        groups: int = 2,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.part = inputs, outputs, part
        self.parts = (size[0] // part[0], size[1] // part[1])
        self.has_global = self.parts != (1, 1)
        values = inputs * self.parts[0] * self.parts[1]
        if self.has_global:
            self.pool = nn.AvgPool2d(part)
            self.mix = nn.Sequential(nn.Linear(values, values), nn.ReLU(), nn.Linear(values, values))
        positions = part[0] * part[1]
        self.fc3 = nn.Conv2d(inputs * positions, outputs * positions, 1, groups=groups, bias=False)
        self.fc3_bn = nn.BatchNorm1d(outputs * positions)
        self.branches = nn.ModuleList(conv_bn(inputs, outputs, kernel, groups=groups) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.part, self.parts
        cut = x.reshape(-1, self.inputs, rows, height, columns, width)
        if self.has_global:
            mixed = self.mix(self.pool(x).reshape(-1, self.inputs * rows * columns))
            cut = cut + mixed.reshape(-1, self.inputs, rows, 1, columns, 1)
        partitions = cut.permute(0, 2, 4, 1, 3, 5)
        full = self.fc3(partitions.reshape(-1, self.inputs * height * width, 1, 1))
        full = self.fc3_bn(full.reshape(-1, self.outputs * height * width))
        y = full.reshape(-1, rows, columns, self.outputs, height, width)
        if len(self.branches):
            local = sum(branch(partitions.reshape(-1, self.inputs, height, width)) for branch in self.branches)
            y = y + local.reshape(-1, rows, columns, self.outputs, height, width)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.outputs, rows * height, columns * width)


class RepMLPNetBlock(nn.Module):
    """Ding et al. 2022, *RepMLPNet*: channels share weights in sets, one group a set, and the branches are depthwise.

    The result is scaled by a squeeze-excite of the whole input.
    """

    def __init__(
        self,
        channels: int = 8,
        sets: int = 2,
        size: tuple[int, int] = (6, 8),
        part: tuple[int, int] = (3, 4),
        kernels: tuple[int, ...] = (1, 3),
    ) -> None:
        super().__init__()
        self.channels, self.sets, self.part = channels, sets, part
        self.parts = (size[0] // part[0], size[1] // part[1])
        positions = part[0] * part[1]
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(channels, 4, 1), nn.ReLU(), conv(4, channels, 1), nn.Sigmoid()
        )
        self.fc3 = nn.Conv2d(sets * positions, sets * positions, 1, groups=sets, bias=False)
        self.fc3_bn = nn.BatchNorm1d(sets)
        self.branches = nn.ModuleList(conv_bn(sets, sets, kernel, groups=sets) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns) = self.part, self.parts
        cut = x.reshape(-1, self.channels, rows, height, columns, width)
        partitions = cut.permute(0, 2, 4, 1, 3, 5)
        full = self.fc3(partitions.reshape(-1, self.sets * height * width, 1, 1))
        full = self.fc3_bn(full.reshape(-1, self.sets, height * width))
        y = full.reshape(-1, rows, columns, self.sets, height, width)
        if len(self.branches):
            local = sum(branch(partitions.reshape(-1, self.sets, height, width)) for branch in self.branches)
            y = y + local.reshape(-1, rows, columns, self.sets, height, width)
        image = y.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        return image * self.squeeze(x)
