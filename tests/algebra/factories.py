"""Factories of random maps: the map under test, beside the same layer as torch runs it.

A new kind of map is one new factory; every law runs over all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from repconv_cli.algebra import (
    Axis,
    ConvMap,
    average_pool_map,
    batch_norm_scale_and_shift,
    conv_map,
    identity,
    scale_map,
    transposed_conv_map,
)
from repconv_cli.errors import InexactError

from .oracle import CONVOLUTIONS, Pads, TorchLayer, pad

EPS = 1e-5
SIZES = {0: [()], 1: [(9,), (8,)], 2: [(9, 8), (8, 9)], 3: [(5, 4, 6), (4, 5, 5)]}


@dataclass(frozen=True)
class Sample:
    """A map and its oracle. ``has_spare_taps`` marks a kernel wider than its nonzero taps."""

    name: str
    map: ConvMap
    torch: TorchLayer
    has_spare_taps: bool = False

    @property
    def dims(self) -> int:
        return len(self.torch.window)

    @property
    def in_channels(self) -> int:
        return self.torch.in_channels

    @property
    def out_channels(self) -> int:
        return self.map.geometry.out_channels

    def __repr__(self) -> str:
        return self.name


class Draw:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: str) -> None:
        self._generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64) + 0.5


Factory = Callable[[str, Draw, bool], Sample]


@cache
def random_input(channels: int, sizes: tuple[int, ...], seed: str = "input", batch: int = 2) -> Tensor:
    """Return a float64 input ``(N, C, *sizes)``."""
    return Draw(f"{seed}{channels}{sizes}").normal(batch, channels, *sizes)


@cache
def answer(sample: Sample, sizes: tuple[int, ...]) -> Tensor:
    """Return torch's output of a sample on the one random input of these sizes."""
    return sample.torch(random_input(sample.in_channels, sizes))


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Factory:
    """Return a factory of one of torch's own convolution modules, which does its own padding."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        layer = kind(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        ).double()
        for parameter in layer.parameters():
            parameter.data = draw.normal(*parameter.shape)
        layer.requires_grad_(False)
        map_ = conv_map(
            layer.weight,
            layer.bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
        )
        dims = len(kernel)
        window = tuple(dilation * (k - 1) + 1 for k in kernel)
        if padding == "same":
            pads = tuple(((w - 1) // 2, w - 1 - (w - 1) // 2) for w in window)
        else:
            pads = tuple((p, p) for p in ((padding,) * dims if isinstance(padding, int) else padding))

        def core(x: Tensor) -> Tensor:
            return CONVOLUTIONS[dims](x, layer.weight, layer.bias, layer.stride, 0, dilation, groups)

        return Sample(name, map_, TorchLayer(layer, core, in_channels, window, layer.stride, pads, padding_mode))

    return make


def padded_convolution(
    channels: int, kernel: tuple[int, ...], pads: Pads, *, stride: tuple[int, ...] | None = None, mode: str = "zeros"
) -> Factory:
    """Return a factory of a pad (or crop) as torch pads, then an unpadded convolution."""
    strides = stride or (1,) * len(kernel)

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        weight = draw.normal(channels, channels, *kernel)
        shift = draw.normal(channels) if bias else None

        def core(x: Tensor) -> Tensor:
            return CONVOLUTIONS[len(kernel)](x, weight, shift, strides)

        layer = TorchLayer(lambda x: core(pad(x, pads, mode)), core, channels, kernel, strides, pads, mode)
        return Sample(name, conv_map(weight, shift, stride=strides, padding=pads, padding_mode=mode), layer)

    return make


def transposed(
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int = 0,
    output_padding: int | tuple[int, ...] = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Factory:
    """Return a factory of one of torch's own transposed convolutions."""
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(kernel)]

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        layer = kind(
            in_channels, out_channels, kernel, stride, padding, output_padding, groups, bias, dilation
        ).double()
        for parameter in layer.parameters():
            parameter.data = draw.normal(*parameter.shape)
        layer.requires_grad_(False)
        map_ = transposed_conv_map(
            layer.weight,
            layer.bias,
            stride=layer.stride,
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation=layer.dilation,
            groups=groups,
        )
        window = tuple(dilation * (k - 1) + 1 for k in kernel)
        is_plain = all(s == 1 for s in layer.stride)
        pads = tuple((w - 1 - padding, w - 1 - padding + o) for w, o in zip(window, layer.output_padding, strict=True))

        def core(x: Tensor) -> Tensor:
            # A transposed convolution that crops its whole skirt reads full windows only.
            skirt = tuple(w - 1 for w in window)
            function = {
                1: functional.conv_transpose1d,
                2: functional.conv_transpose2d,
                3: functional.conv_transpose3d,
            }[len(kernel)]
            return function(x, layer.weight, layer.bias, layer.stride, skirt, 0, groups, dilation)

        layer_record = TorchLayer(layer, core, in_channels, window, layer.stride, pads, is_transposed=not is_plain)
        return Sample(name, map_, layer_record)

    return make


def batch_norm(channels: int, dims: int) -> Factory:
    """Return a factory of a batch norm: gamma partly negative, one variance tiny, statistics never initial."""

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        gamma, beta, mean, var = draw.positive(channels), draw.normal(channels), draw.normal(channels), None
        gamma[::2] *= -1.0
        var = draw.positive(channels)
        var[1] = 1e-9
        if not bias:
            beta, mean = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)

        def core(x: Tensor) -> Tensor:
            return functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS)

        map_ = scale_map(*batch_norm_scale_and_shift(gamma, beta, mean, var, EPS), dims)
        ones = (1,) * dims
        return Sample(name, map_, TorchLayer(core, core, channels, ones, ones, ((0, 0),) * dims))

    return make


def average_pool(channels: int, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> Factory:
    """Return a factory of an average pool; it has no bias to draw."""
    dims = len(kernel)
    function = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[dims]

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        axes = tuple(Axis(k, s, 1, p, p) for k, s, p in zip(kernel, stride, padding, strict=True))
        layer = TorchLayer(
            lambda x: function(x, kernel, stride, padding),
            lambda x: function(x, kernel, stride),
            channels,
            kernel,
            stride,
            tuple((p, p) for p in padding),
        )
        return Sample(name, average_pool_map(channels, axes), layer)

    return make


def identities(channels: int, dims: int, kernel: int = 1, padding: int = 0) -> Factory:
    """Return a factory of the identity, as a delta in a kernel of the given size."""

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        pads = ((padding, kernel - 1 - padding),) * dims

        def core(x: Tensor) -> Tensor:
            return pad(x, tuple((-low, -high) for low, high in pads))

        layer = TorchLayer(lambda x: x.clone(), core, channels, (kernel,) * dims, (1,) * dims, pads)
        return Sample(name, identity(channels, dims, kernel, padding), layer, has_spare_taps=kernel > 1)

    return make


def scale(channels: int, dims: int) -> Factory:
    """Return a factory of a scale and shift per channel."""

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        factor, shift = draw.normal(channels), draw.normal(channels) if bias else None

        def core(x: Tensor) -> Tensor:
            shape = (1, -1, *(1,) * dims)
            return x * factor.reshape(shape) + (0.0 if shift is None else shift.reshape(shape))

        ones = (1,) * dims
        return Sample(
            name, scale_map(factor, shift, dims), TorchLayer(core, core, channels, ones, ones, ((0, 0),) * dims)
        )

    return make


def linear(in_channels: int, out_channels: int) -> Factory:
    """Return a factory of a linear layer."""

    def make(name: str, draw: Draw, bias: bool) -> Sample:
        weight = draw.normal(out_channels, in_channels)
        shift = draw.normal(out_channels) if bias else None

        def core(x: Tensor) -> Tensor:
            return functional.linear(x, weight, shift)

        return Sample(name, conv_map(weight, shift), TorchLayer(core, core, in_channels))

    return make


FACTORIES: dict[str, Factory] = {
    "dense": convolution(4, 4, (3, 3), padding=1),
    "dense valid": convolution(4, 4, (3, 3)),
    "grouped": convolution(4, 4, (3, 3), padding=1, groups=2),
    "depthwise": convolution(4, 4, (3, 3), padding=1, groups=4),
    "pointwise": convolution(4, 4, (1, 1)),
    "grouped pointwise": convolution(4, 4, (1, 1), groups=2),
    "strided": convolution(4, 4, (3, 3), stride=2, padding=1),
    "strided pointwise": convolution(4, 4, (1, 1), stride=2),
    "strided on one axis": convolution(4, 4, (3, 2), stride=(1, 2), padding=(1, 0), groups=2),
    "dilated": convolution(4, 4, (3, 3), dilation=2, padding=2, groups=2),
    "even 2x2, padded after": padded_convolution(4, (2, 2), ((0, 1), (0, 1))),
    "even 4x4 same": convolution(4, 4, (4, 4), padding="same"),
    "even 4x4": convolution(4, 4, (4, 4), padding=1, groups=4),
    "vertical": convolution(4, 4, (3, 1), padding=(1, 0)),
    "horizontal": convolution(4, 4, (1, 3), padding=(0, 1), groups=4),
    "asymmetrical padding": padded_convolution(4, (3, 3), ((2, 0), (1, 1))),
    "overpadded pointwise": convolution(4, 4, (1, 1), padding=1),
    "crop": padded_convolution(4, (2, 2), ((-1, 0), (1, -2))),
    "reflect": convolution(4, 4, (3, 3), padding=1, padding_mode="reflect"),
    "replicate": convolution(4, 4, (3, 3), padding=1, padding_mode="replicate", groups=2),
    "circular": convolution(4, 4, (3, 3), padding=1, padding_mode="circular"),
    "circular shift": padded_convolution(4, (1, 1), ((-1, 1), (2, -2)), mode="circular"),
    "batch norm": batch_norm(4, 2),
    "average pool": average_pool(4, (3, 3), (1, 1), (1, 1)),
    "strided average pool": average_pool(4, (2, 2), (2, 2), (0, 0)),
    "identity": identities(4, 2),
    "identity in a 3x3": identities(4, 2, kernel=3, padding=1),
    "scale": scale(4, 2),
    "transposed, stride 1": transposed(4, 4, (3, 3), padding=1, groups=2),
    "transposed, stride 2": transposed(4, 4, (4, 4), stride=2, padding=1, groups=2),
    "channel multiplier": convolution(4, 8, (3, 3), padding=1, groups=4),
    "narrowing": convolution(8, 4, (3, 3), padding=1, groups=2),
    "narrowing pointwise": convolution(8, 6, (1, 1)),
    "1-d": convolution(4, 4, (3,), padding=1),
    "1-d grouped and strided": convolution(4, 4, (4,), stride=2, padding=1, groups=2),
    "1-d dilated": convolution(4, 4, (3,), dilation=3, padding=3, groups=4),
    "1-d batch norm": batch_norm(4, 1),
    "1-d average pool": average_pool(4, (3,), (1,), (1,)),
    "1-d transposed": transposed(4, 4, (3,), stride=2, padding=1, output_padding=1),
    "1-d transposed, dilated": transposed(4, 4, (3,), dilation=2, padding=1, output_padding=1),
    "1-d transposed, cropped": transposed(4, 4, (2,), padding=2),
    "1-d identity": identities(4, 1),
    "3-d": convolution(2, 2, (3, 3, 3), padding=1),
    "3-d uneven": convolution(2, 2, (1, 2, 3), stride=(1, 2, 1), padding=(0, 0, 1), groups=2),
    "3-d pointwise": convolution(2, 2, (1, 1, 1)),
    "3-d batch norm": batch_norm(2, 3),
    "3-d average pool": average_pool(2, (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "linear": linear(4, 4),
    "linear widening": linear(4, 6),
    "linear batch norm": batch_norm(4, 0),
    "linear scale": scale(4, 0),
    "linear identity": identities(4, 0),
}


@cache
def make(name: str, *, bias: bool = True, seed: str = "") -> Sample:
    """Return a random map of the factory ``name``; equal arguments give equal maps."""
    return FACTORIES[name](name, Draw(name + seed), bias)


def names(dims: int | None = None) -> list[str]:
    """Return the factories' names, all of them or those with ``dims`` spatial axes."""
    return [name for name in FACTORIES if dims is None or make(name).dims == dims]


SHAPES: dict[str, tuple[int, int, int]] = {
    name: (sample.dims, sample.in_channels, sample.out_channels) for name, sample in ((n, make(n)) for n in FACTORIES)
}
PARTNERS_BELOW = {
    outer: [inner for inner, (dims, _, channels) in SHAPES.items() if (dims, channels) == SHAPES[outer][:2]]
    for outer in SHAPES
}
PARTNERS_BESIDE = {
    left: [right for right, (dims, channels, _) in SHAPES.items() if (dims, channels) == SHAPES[left][:2]]
    for left in SHAPES
}
SUMMANDS = {left: [r for r in rights if SHAPES[r][2] == SHAPES[left][2]] for left, rights in PARTNERS_BESIDE.items()}


@contextmanager
def naming(*samples: Sample) -> Iterator[None]:
    """Say which pair it was, if the block fails."""
    try:
        yield
    except Exception as error:
        error.add_note(f"with {', '.join(map(str, samples))}")
        raise


def attempt(operation: Callable[..., ConvMap], *arguments: object) -> tuple[ConvMap | None, str]:
    """Return (map, "") or (None, reason)."""
    try:
        return operation(*arguments), ""
    except InexactError as error:
        return None, error.found
