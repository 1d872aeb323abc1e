"""How torch's layers become maps."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repconv_cli.algebra.convmap import (
    ConvMap,
    average_pool_map,
    batch_norm_scale_and_shift,
    conv_map,
    scale_map,
    transposed_conv_map,
)
from repconv_cli.algebra.geometry import Axis
from repconv_cli.errors import InexactError


def layer_map(layer: nn.Module, dims: int = 2, channels: int | None = None) -> ConvMap:
    """Return the map of one torch layer as it behaves in eval mode, in float64.

    Convolutions (plain and transposed), linear layers, batch norms and average pools have one; ``dims`` is the number
    of spatial axes for a norm, and ``channels`` must be given for a pool, which has no weights to tell it.
    Raises :class:`InexactError` with the reason for a layer that is no such map.

    >>> layer_map(nn.Conv2d(3, 8, 3, padding=1)).weight.shape
    torch.Size([8, 3, 3, 3])
    """
    if isinstance(layer, _ConvTransposeNd):
        return transposed_conv_map(
            layer.weight,
            layer.bias,
            stride=layer.stride,
            padding=tuple(int(p) for p in layer.padding),
            output_padding=layer.output_padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )
    if isinstance(layer, _ConvNd):
        return conv_map(
            layer.weight,
            layer.bias,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            padding_mode=layer.padding_mode,
        )
    if isinstance(layer, nn.Linear):
        return conv_map(layer.weight, layer.bias)
    if isinstance(layer, _BatchNorm):
        if layer.running_mean is None or layer.running_var is None:
            raise InexactError("batch norm without running statistics depends on the batch")
        gamma, beta = layer.weight, layer.bias
        return scale_map(
            *batch_norm_scale_and_shift(gamma, beta, layer.running_mean, layer.running_var, layer.eps), dims
        )
    if isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)) and channels is not None:
        return _pool_map(layer, channels)
    raise InexactError(f"{type(layer).__name__} is not an affine, shift-equivariant map")


def _pool_map(layer: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, channels: int) -> ConvMap:
    dims = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(layer)]

    def per_axis(value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value)

    padding = per_axis(layer.padding)
    if layer.ceil_mode:
        raise InexactError("average pool in ceil mode: windows past the border average fewer values")
    if any(padding) and not layer.count_include_pad:
        raise InexactError("average pool that leaves padding uncounted averages fewer values at the border")
    axes = tuple(
        Axis(k, s, 1, p, p)
        for k, s, p in zip(per_axis(layer.kernel_size), per_axis(layer.stride), padding, strict=True)
    )
    return average_pool_map(channels, axes, getattr(layer, "divisor_override", None))
