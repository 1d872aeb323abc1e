"""Affine, shift-equivariant maps and the operations under which they are closed."""

from repconv_cli.algebra.convmap import (
    ConvMap,
    Kernel,
    average_pool_map,
    batch_norm_scale_and_shift,
    conv_map,
    identity,
    scale_map,
    transposed_conv_map,
)
from repconv_cli.algebra.geometry import Axis, Geometry
from repconv_cli.algebra.layers import layer_map
from repconv_cli.algebra.operations import compose, concatenate, embed, fold, merge, regroup, select, subtract, widen

__all__ = [
    "Axis",
    "ConvMap",
    "Geometry",
    "Kernel",
    "average_pool_map",
    "batch_norm_scale_and_shift",
    "compose",
    "concatenate",
    "conv_map",
    "embed",
    "fold",
    "identity",
    "layer_map",
    "merge",
    "regroup",
    "scale_map",
    "select",
    "subtract",
    "transposed_conv_map",
    "widen",
]
