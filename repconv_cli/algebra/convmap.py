"""``ConvMap``: an affine, shift-equivariant map, as one convolution in float64."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from repconv_cli.algebra.geometry import Axis, Geometry

MAX_SPATIAL_AXES = 3


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel as it is stored: ``weight`` of ``geometry`` in any floating type, and no bias.

    What is made of it is float64 all the same. Of a large one, the cast is never there as a whole.
    """

    weight: Tensor
    geometry: Geometry

    @property
    def bias(self) -> Tensor:
        """Zeros, float64."""
        return torch.zeros(self.geometry.out_channels, dtype=torch.float64, device=self.weight.device)


@dataclass(frozen=True, eq=False)
class ConvMap:
    """The map ``y[o, j] = bias[o] + sum_{i, t} weight[o, i, t] * x[i, stride * j + first + dilation * t]``.

    ``weight`` is ``(O, I/groups, *kernel)`` and ``bias`` ``(O,)``, both float64. With no spatial axis it is a
    linear layer. The tensors belong to the map and must not be written to.

    >>> pointwise = ConvMap(torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), Geometry(2, 2))
    >>> pointwise(torch.ones(1, 2, dtype=torch.float64)).tolist()
    [[2.0, 2.0]]
    """

    weight: Tensor
    bias: Tensor
    geometry: Geometry

    def __post_init__(self) -> None:
        geometry = self.geometry
        if tuple(self.weight.shape) != geometry.weight_shape:
            raise ValueError(f"weight is {tuple(self.weight.shape)}, its geometry needs {geometry.weight_shape}")
        if tuple(self.bias.shape) != (geometry.out_channels,):
            raise ValueError(f"bias is {tuple(self.bias.shape)}, needed ({geometry.out_channels},)")
        if self.weight.dtype != torch.float64 or self.bias.dtype != torch.float64:
            raise ValueError(f"weight is {self.weight.dtype}, bias {self.bias.dtype}; needed torch.float64")
        if len(geometry.axes) > MAX_SPATIAL_AXES:
            raise ValueError(f"{len(geometry.axes)} spatial axes, needed at most {MAX_SPATIAL_AXES}")

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride of each spatial axis."""
        return tuple(axis.stride for axis in self.geometry.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Padding (low, high) of each spatial axis."""
        return tuple((axis.low, axis.high) for axis in self.geometry.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation of each spatial axis."""
        return tuple(axis.dilation for axis in self.geometry.axes)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.geometry.groups

    @property
    def padding_mode(self) -> str:
        """How positions outside the input are read: zeros, reflect, replicate or circular."""
        return self.geometry.padding_mode

    def __call__(self, x: Tensor) -> Tensor:
        """Return the map of ``x``, ``(N, C, *spatial)``, computed by torch in ``x``'s dtype."""
        geometry = self.geometry
        x = x.narrow(1, geometry.reads, geometry.in_channels)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not geometry.axes:
            return _linear(x, weight, bias, geometry.groups)
        if geometry.transposed:
            return _transposed(x, weight, bias, geometry)
        widths = [side for axis in reversed(geometry.axes) for side in (axis.low, axis.high)]
        if any(widths):
            # torch takes crops (negative widths) in the constant mode alone. Pad first: a circle cropped
            # before it is padded would wrap around to the wrong values.
            mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
            x = functional.pad(x, [max(width, 0) for width in widths], mode)
            x = functional.pad(x, [min(width, 0) for width in widths])
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(geometry.axes) - 1]
        return convolve(x, weight, bias, self.stride, 0, self.dilation, geometry.groups)


def conv_map(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int | tuple[int, int], ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> ConvMap:
    """Return the ``ConvMap`` of a convolution given in torch's terms; weights are copied to float64.

    ``padding`` is a number, one number or (low, high) pair per axis, ``"same"`` or ``"valid"``. Torch splits an
    odd total of ``"same"`` with the larger half after.

    >>> conv_map(torch.ones(4, 3, 4, 4), padding="same").padding
    ((1, 2), (1, 2))
    """
    dims = weight.ndim - 2
    strides, dilations = _per_axis(stride, dims), _per_axis(dilation, dims)
    pads = padding_pairs(padding, tuple(weight.shape[2:]), dilations)
    axes = tuple(
        Axis(kernel, s, d, low, high)
        for kernel, s, d, (low, high) in zip(weight.shape[2:], strides, dilations, pads, strict=True)
    )
    geometry = Geometry(weight.shape[0], weight.shape[1] * groups, groups, axes, padding_mode)
    return ConvMap(_float64(weight), _bias(bias, weight.shape[0]), geometry)


def padding_pairs(
    padding: int | str | tuple[int | tuple[int, int], ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Return padding as (low, high) per axis, from any of torch's ways to say it."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r}, needed a number, 'same' or 'valid'")
    if isinstance(padding, int):
        return ((padding, padding),) * len(kernel)
    given = padding * len(kernel) if len(padding) == 1 else padding
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in given)


def identity(channels: int, dims: int = 2, kernel: int = 1, padding: int = 0) -> ConvMap:
    """Return the identity as a depthwise delta kernel, its one at index ``padding`` of each axis.

    Output and input have the same size where ``kernel`` is ``2 * padding + 1`` or ``high`` makes it so:
    the kernel's far end is padded by ``kernel - 1 - padding``.

    >>> identity(2, dims=1, kernel=3, padding=1).weight.tolist()
    [[[0.0, 1.0, 0.0]], [[0.0, 1.0, 0.0]]]
    """
    if not 0 <= padding < kernel:
        raise ValueError(f"padding={padding} must be an index of a kernel of {kernel}")
    weight = torch.zeros(channels, 1, *(kernel,) * dims, dtype=torch.float64)
    weight.flatten(1)[:, sum(padding * kernel**axis for axis in range(dims))] = 1.0
    axes = (Axis(kernel, low=padding, high=kernel - 1 - padding),) * dims
    return ConvMap(weight, _bias(None, channels), Geometry(channels, channels, channels, axes))


def scale_map(scale: Tensor, shift: Tensor | None = None, dims: int = 2) -> ConvMap:
    """Return ``scale * x + shift`` per channel as a depthwise 1x1."""
    channels = scale.shape[0]
    weight = _float64(scale).reshape(channels, 1, *(1,) * dims)
    return ConvMap(weight, _bias(shift, channels), Geometry(channels, channels, channels, (Axis(),) * dims))


def batch_norm_scale_and_shift(
    gamma: Tensor | None, beta: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) of a batch norm in eval mode, float64 ``(C,)``.

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``.

    Reference: Ioffe and Szegedy 2015, *Batch Normalization*, algorithm 2.
    """
    scale = torch.rsqrt(var.detach().double() + eps)
    if gamma is not None:
        scale = scale * gamma.detach().double()
    shift = -mean.detach().double() * scale
    if beta is not None:
        shift = shift + beta.detach().double()
    return scale, shift


def average_pool_map(channels: int, axes: tuple[Axis, ...], divisor: int | None = None) -> ConvMap:
    """Return an average pool whose padding counts, as a depthwise kernel of ``1 / divisor``."""
    kernel = tuple(axis.kernel for axis in axes)
    value = 1.0 / (divisor if divisor is not None else prod(kernel))
    weight = torch.full((channels, 1, *kernel), value, dtype=torch.float64)
    return ConvMap(weight, _bias(None, channels), Geometry(channels, channels, channels, axes))


def transposed_conv_map(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
) -> ConvMap:
    """Return the map of a transposed convolution with torch's weight ``(I, O/groups, *kernel)``.

    With stride 1 it is the convolution with the kernel flipped and padding ``dilation * (kernel - 1) - padding``.
    Otherwise it stays marked as transposed, and takes norms, scales and 1x1 maps after it.
    """
    inputs, per_group = weight.shape[0], weight.shape[1]
    kernel = weight.shape[2:]
    grouped = _float64(weight).reshape(groups, inputs // groups, per_group, *kernel)
    swapped = grouped.transpose(1, 2).reshape(groups * per_group, inputs // groups, *kernel)
    is_plain = all(s == 1 for s in stride)
    if is_plain:
        swapped = swapped.flip(tuple(range(2, swapped.ndim)))
    axes = tuple(
        Axis(k, s, d, d * (k - 1) - p, d * (k - 1) - p + o) if is_plain else Axis(k, s, d, p, p - o)
        for k, s, d, p, o in zip(kernel, stride, dilation, padding, output_padding, strict=True)
    )
    geometry = Geometry(groups * per_group, inputs, groups, axes, transposed=not is_plain)
    return ConvMap(swapped.contiguous(), _bias(bias, groups * per_group), geometry)


def transposed_weight(weight: Tensor, groups: int) -> Tensor:
    """Return a weight ``(O, I/groups, *kernel)`` in the layout of transposed layers, ``(I, O/groups, *kernel)``."""
    outputs, per_group = weight.shape[0], weight.shape[1]
    grouped = weight.reshape(groups, outputs // groups, per_group, *weight.shape[2:])
    return grouped.transpose(1, 2).reshape(groups * per_group, outputs // groups, *weight.shape[2:]).contiguous()


def _per_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


def _bias(bias: Tensor | None, channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64) if bias is None else _float64(bias)


def _float64(values: Tensor) -> Tensor:
    """Return a copy, so that a map outlives any later step of what it was made from."""
    return values.detach().to(torch.float64, copy=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    parts = [
        functional.linear(part, kernel)
        for part, kernel in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True)
    ]
    return torch.cat(parts, 1) + bias


def _transposed(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
    convolve = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[
        len(geometry.axes) - 1
    ]
    return convolve(
        x,
        transposed_weight(weight, geometry.groups),
        bias,
        tuple(axis.stride for axis in geometry.axes),
        tuple(axis.low for axis in geometry.axes),
        tuple(axis.low - axis.high for axis in geometry.axes),
        geometry.groups,
        tuple(axis.dilation for axis in geometry.axes),
    )
