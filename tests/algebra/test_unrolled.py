"""A kernel written out over an image of known sizes is the matrix of torch's convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from repconv_cli.algebra import Axis, Geometry
from repconv_cli.algebra.unrolled import add_unrolled

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
GEOMETRIES = {
    "pointwise": (Geometry(3, 4, 1, (Axis(), Axis())), (3, 5)),
    "padded": (Geometry(3, 2, 1, (Axis(3, low=1, high=1), Axis(5, low=2, high=2))), (4, 6)),
    "uneven padding": (Geometry(2, 2, 1, (Axis(4, low=0, high=3), Axis(2, low=3, high=0))), (4, 5)),
    "cropped": (Geometry(2, 2, 1, (Axis(2, low=-1, high=1), Axis(1, low=1, high=-2))), (5, 6)),
    "strided": (Geometry(3, 2, 1, (Axis(3, 2, low=1, high=1), Axis(3, 3, low=0, high=2))), (7, 8)),
    "dilated": (Geometry(2, 3, 1, (Axis(3, dilation=2, low=2, high=2), Axis(2, dilation=3, low=1, high=2))), (6, 7)),
    "grouped": (Geometry(6, 4, 2, (Axis(3, low=1, high=1), Axis(1))), (4, 3)),
    "one axis": (Geometry(2, 3, 1, (Axis(5, low=2, high=2),)), (9,)),
    "three axes": (Geometry(2, 2, 1, (Axis(3, low=1, high=1), Axis(1), Axis(2, low=0, high=1))), (3, 2, 4)),
    "wider than the image": (Geometry(1, 2, 1, (Axis(7, low=3, high=3), Axis(5, low=2, high=2))), (2, 3)),
}


def convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    widths = [side for axis in reversed(geometry.axes) for side in (axis.low, axis.high)]
    strides, dilations = [axis.stride for axis in geometry.axes], [axis.dilation for axis in geometry.axes]
    run = CONVOLUTIONS[len(geometry.axes)]
    y: Tensor = run(functional.pad(x, widths), weight, None, strides, 0, dilations, geometry.groups)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_matrix_gives_what_the_convolution_gives_onto_what_is_there(name: str, dtype: torch.dtype) -> None:
    geometry, sizes = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(geometry.weight_shape, generator=generator, dtype=dtype)
    x = torch.randn(2, geometry.in_channels, *sizes, generator=generator, dtype=torch.float64)
    expected = convolved(x, weight.double(), geometry).flatten(1)
    scale = torch.randn(expected.shape[1], generator=generator, dtype=torch.float64)
    there = torch.randn(len(scale), x[0].numel() // geometry.groups, generator=generator, dtype=torch.float64)
    total = there.clone()
    add_unrolled(total, weight, geometry, sizes, scale)
    rows = (total - there).view(geometry.groups, -1, total.shape[1])
    found = torch.einsum("goi,bgi->bgo", rows, x.view(2, geometry.groups, -1)).flatten(1)
    torch.testing.assert_close(found, expected * scale, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_a_large_layer_is_written_row_by_row() -> None:
    geometry = Geometry(600, 500, 1, (Axis(), Axis()))
    weight, scale = torch.randn(600, 500, 1, 1), torch.randn(600, dtype=torch.float64)
    total = torch.zeros(600, 500, dtype=torch.float64)
    add_unrolled(total, weight, geometry, (1, 1), scale)
    assert torch.equal(total, weight.double().flatten(1) * scale[:, None])
