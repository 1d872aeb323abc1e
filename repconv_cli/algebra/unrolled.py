"""A map on an image of known sizes, written out as the matrix that it is on the image's values."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from repconv_cli.algebra.geometry import Geometry
from repconv_cli.algebra.slabs import slabs


def add_unrolled(total: Tensor, weight: Tensor, geometry: Geometry, sizes: tuple[int, ...], scale: Tensor) -> None:
    """Add in place to ``total`` the matrix of a kernel on images of ``sizes``, its rows scaled; padding is zero.

    ``total[o * P + p, i * S + s] += scale[o * P + p] * weight[o, i, k]`` where tap ``k`` at output position ``p`` reads
    input position ``s``, of ``P`` and ``S``. Of a grouped map each row has the inputs of its own group alone, as its
    kernel has. ``weight`` is of any floating type, ``total`` and ``scale`` are float64.

    >>> from repconv_cli.algebra.geometry import Axis
    >>> total = torch.zeros(3, 3, dtype=torch.float64)
    >>> rows = torch.ones(3, dtype=torch.float64)
    >>> add_unrolled(total, torch.tensor([[[1.0, 2.0, 3.0]]]), Geometry(1, 1, 1, (Axis(3, low=1, high=1),)), (3,), rows)
    >>> total.tolist()
    [[2.0, 3.0, 0.0], [1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]
    """
    outputs, inputs = geometry.weight_shape[:2]
    places = prod(geometry.output_sizes(sizes))
    matrix = total.view(outputs, places, inputs, prod(sizes))
    factors = scale.view(outputs, places)
    read = list(_positions_read(geometry, sizes))
    for rows, part in slabs(weight.reshape(outputs, inputs, -1)):
        for tap, (at, of) in enumerate(read):
            matrix[rows][:, at, :, of] += part[:, :, tap] * factors[rows][:, at].t().unsqueeze(2)


def _positions_read(geometry: Geometry, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each tap the output positions at which it reads no padding, and the input positions that it reads."""
    read, is_inside = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for axis, size, count in zip(geometry.axes, sizes, geometry.output_sizes(sizes), strict=True):
        taps = axis.dilation * torch.arange(axis.kernel)[:, None]
        here = axis.stride * torch.arange(count) + axis.first + taps
        read = (read[:, None, :, None] * size + here[None, :, None, :]).flatten(2).flatten(0, 1)
        is_here = (here >= 0) & (here < size)
        is_inside = (is_inside[:, None, :, None] & is_here[None, :, None, :]).flatten(2).flatten(0, 1)
    for positions, inside in zip(read, is_inside, strict=True):
        yield inside.nonzero().flatten(), positions[inside]
