"""The vocabulary on maps: merge, subtract, compose, fold, embed, regroup, concatenate, select.

Each operation is exact or raises :class:`~repconv_cli.errors.InexactError` with the reason. ``sizes`` are the
spatial sizes of the anchor; ``None`` (the default, for every axis) asks that it hold for any size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from repconv_cli.algebra.border import compose_geometry
from repconv_cli.algebra.convmap import ConvMap, Kernel
from repconv_cli.algebra.geometry import (
    Axis,
    Geometry,
    concatenate_geometry,
    merge_geometry,
    regroup_geometry,
    select_geometry,
)
from repconv_cli.algebra.slabs import slab_places, slabs
from repconv_cli.errors import InexactError

Sizes = tuple[int | None, ...]


def fold(inner: ConvMap, scale: Tensor, shift: Tensor | None = None) -> ConvMap:
    """Return ``scale * inner(x) + shift``, one factor per output channel. Always exact.

    ``weight' = scale * weight``, ``bias' = scale * bias + shift``.
    """
    bias = scale * inner.bias if shift is None else scale * inner.bias + shift
    return ConvMap(inner.weight * scale.reshape(-1, *(1,) * (inner.weight.ndim - 1)), bias, inner.geometry)


def regroup(inner: ConvMap, groups: int) -> ConvMap:
    """Return the same map over fewer ``groups``, zeros between the old ones. Always exact; costs more.

    >>> from repconv_cli.algebra.convmap import identity
    >>> regroup(identity(2, dims=0), 1).weight.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if groups == inner.groups:
        return inner
    geometry = regroup_geometry(inner.geometry, groups)
    ratio = inner.groups // groups
    outputs, inputs = inner.geometry.out_channels // inner.groups, inner.geometry.in_channels // inner.groups
    kernel = inner.weight.shape[2:]
    dense = inner.weight.new_zeros(groups, ratio, outputs, ratio, inputs, *kernel)
    blocks = inner.weight.reshape(groups, ratio, outputs, inputs, *kernel).movedim(1, -1)
    dense.diagonal(dim1=1, dim2=3).copy_(blocks)
    return ConvMap(dense.reshape(geometry.weight_shape), inner.bias, geometry)


def embed(inner: ConvMap, axes: tuple[Axis, ...]) -> ConvMap:
    """Return the same map with its taps placed on the lattice ``axes``, zeros elsewhere.

    The place follows from the offsets: a 1x1 lands at index ``padding``, never at ``kernel // 2``.
    """
    if axes == inner.geometry.axes:
        return inner
    weight = inner.weight.new_zeros(*inner.weight.shape[:2], *(axis.kernel for axis in axes))
    places = tuple(_place(small, large) for small, large in zip(inner.geometry.axes, axes, strict=True))
    weight[(slice(None), slice(None), *places)] = inner.weight
    return ConvMap(weight, inner.bias, replace(inner.geometry, axes=axes))


def _place(small: Axis, large: Axis) -> slice:
    start, off = divmod(small.first - large.first, large.dilation)
    step, off_step = divmod(small.dilation, large.dilation) if small.kernel > 1 else (1, 0)
    stop = start + (small.kernel - 1) * step + 1
    if off or off_step or start < 0 or stop > large.kernel:
        raise ValueError(f"the taps of {small} are not taps of {large}")
    return slice(start, stop, step)


def widen(inner: ConvMap, reads: int, width: int) -> ConvMap:
    """Return the same map reading input channels ``[reads, reads + width)``, zeros for the new ones."""
    geometry = inner.geometry
    if (geometry.reads, geometry.in_channels) == (reads, width):
        return inner
    before = geometry.reads - reads
    if before < 0 or before + geometry.in_channels > width:
        # A slice of no channels would take a one-channel kernel without a word, and the map would be zero.
        read = f"[{geometry.reads}, {geometry.reads + geometry.in_channels})"
        raise ValueError(f"channels [{reads}, {reads + width}) must hold {read}, which the map reads")
    dense = regroup(inner, 1)
    weight = inner.weight.new_zeros(geometry.out_channels, width, *inner.weight.shape[2:])
    weight[:, before : before + geometry.in_channels] = dense.weight
    return ConvMap(weight, inner.bias, replace(dense.geometry, reads=reads, in_channels=width))


def reading(inner: ConvMap, geometry: Geometry) -> ConvMap:
    """Return the same map reading the input channels of ``geometry``, in as many groups."""
    return regroup(widen(inner, geometry.reads, geometry.in_channels), geometry.groups)


def reads_alike(left: Geometry, right: Geometry) -> bool:
    """Whether both read the same input channels, in as many groups."""
    return (left.reads, left.in_channels, left.groups) == (right.reads, right.in_channels, right.groups)


def _onto(inner: ConvMap, geometry: Geometry) -> ConvMap:
    """Return ``inner`` written on the taps, channels and groups of ``geometry`` (its own outputs)."""
    grouped = reading(inner, geometry)
    placed = grouped if geometry.transposed else embed(grouped, geometry.axes)
    return ConvMap(placed.weight, placed.bias, replace(geometry, out_channels=inner.geometry.out_channels))


def merge(left: ConvMap, right: ConvMap, sizes: Sizes | None = None) -> ConvMap:
    """Return ``left(x) + right(x)``: kernels embedded on common taps, groups become their gcd, then added.

    Exact where strides and output shapes agree, and padding modes wherever a kernel reaches past the border.
    """
    geometry = merge_geometry(left.geometry, right.geometry, _sizes(left, sizes))
    if left.geometry.out_channels != right.geometry.out_channels:
        raise InexactError(f"{left.geometry.out_channels} channels beside {right.geometry.out_channels}")
    weight = left.weight.new_zeros(geometry.weight_shape)
    for part in (left, right):
        add_onto(weight, geometry, part.weight, part.geometry)
    return ConvMap(weight, left.bias + right.bias, geometry)


def add_onto(total: Tensor, geometry: Geometry, weight: Tensor, own: Geometry, scale: Tensor | None = None) -> None:
    """Add ``scale * weight`` in place to ``total``, a float64 kernel of ``geometry``; its other taps are not touched.

    ``weight`` is a kernel of ``own`` in any floating type. Row by row of the output channels, so that neither its
    float64 copy nor its scaled one is ever there as a whole.
    """
    if not reads_alike(own, geometry):
        placed = reading(
            ConvMap(weight.double(), weight.new_zeros(own.out_channels, dtype=torch.float64), own), geometry
        )
        weight, own = placed.weight, placed.geometry
    if not geometry.transposed:
        places = tuple(_place(small, large) for small, large in zip(own.axes, geometry.axes, strict=True))
        total = total[(slice(None), slice(None), *places)]
    column = _column(scale, weight)
    for place, part in slabs(weight):
        total[place].add_(part if column is None else part * column[place])


def scaled(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return ``scale * weight`` as a new float64 tensor, with one factor per output channel."""
    found = torch.empty(weight.shape, dtype=torch.float64)
    write_scaled(found, weight, scale)
    return found


def write_scaled(out: Tensor, weight: Tensor, scale: Tensor | None = None) -> None:
    """Write ``scale * weight`` to ``out``, a float64 tensor of its shape."""
    column = _column(scale, weight)
    for place in slab_places(weight):
        # A part is multiplied while it is still in the caches.
        part = out[place].copy_(weight[place])
        if column is not None:
            part.mul_(column[place])


def _column(scale: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if scale is None else scale.reshape(-1, *(1,) * (weight.ndim - 1))


def subtract(left: ConvMap, right: ConvMap, sizes: Sizes | None = None) -> ConvMap:
    """Return ``left(x) - right(x)``; exact where :func:`merge` is."""
    minus = ConvMap(-right.weight, -right.bias, right.geometry)
    return merge(left, minus, sizes)


def compose(outer: ConvMap | Kernel, inner: ConvMap, sizes: Sizes | None = None) -> ConvMap:
    """Return ``outer(inner(x))`` as one map.

    ``weight[o, i, ti + stride_i * to] = sum_m outer[o, m, to] * inner[m, i, ti]``,
    ``bias = outer.bias + sum_{m, to} outer[o, m, to] * inner.bias[m]``.

    Exact under the border rule (:mod:`repconv_cli.algebra.border`), and with ``inner``'s bias zero where ``outer``
    reads zeros past the border.
    """
    anchor_sizes = _sizes(inner, sizes)
    inner = select(inner, outer.geometry.reads, outer.geometry.reads + outer.geometry.in_channels)
    geometry = compose_geometry(outer.geometry, inner.geometry, anchor_sizes)
    if bool(inner.bias.any()) and outer.geometry.transposed:
        raise InexactError("a biased map before a transposed convolution, which sums fewer values at the border")
    if bool(inner.bias.any()) and _reads_zeros_beyond(outer.geometry, inner.geometry, anchor_sizes):
        raise InexactError("a biased map before zero padding: the padding is zero, the map evaluated there is not")
    if _is_neutral(inner):
        return ConvMap(outer.weight.double(), outer.bias, geometry)
    weight = compose_kernels(outer, inner, geometry)
    return ConvMap(weight, outer.bias + through(outer, inner.bias), geometry)


def _is_neutral(inner: ConvMap) -> bool:
    """Whether ``inner`` gives its input back."""
    return inner.geometry.is_diagonal() and bool((inner.weight == 1).all()) and not bool(inner.bias.any())


def _reads_zeros_beyond(outer: Geometry, inner: Geometry, sizes: Sizes) -> bool:
    if outer.padding_mode != "zeros" or inner.transposed:
        return False
    middle = tuple(
        None if size is None else axis.output_size(size) for axis, size in zip(inner.axes, sizes, strict=True)
    )
    return outer.reads_outside(middle)


def through(outer: ConvMap | Kernel, constants: Tensor) -> Tensor:
    """Return what ``outer``'s kernel makes of one constant per channel, away from any border."""
    groups = outer.geometry.groups
    constants = constants.reshape(groups, -1, 1)
    if groups == 1:
        return torch.cat([_totals(slab) @ constants[0] for _, slab in slabs(outer.weight)]).reshape(-1)
    totals = _totals(outer.weight.double())
    return (totals.reshape(groups, -1, totals.shape[1]) @ constants).reshape(-1)


def _totals(weight: Tensor) -> Tensor:
    return weight.flatten(2).sum(2) if weight.ndim > 2 else weight


def compose_kernels(outer: ConvMap | Kernel, inner: ConvMap, geometry: Geometry) -> Tensor:
    """Return the kernel of the composition on ``geometry``.

    Some output channels after the other, so that beside the kernel there is no other float64 tensor of its size.
    """
    groups, (outer_groups, inner_groups) = geometry.groups, (outer.geometry.groups, inner.groups)
    if outer_groups % inner_groups and inner_groups % outer_groups:
        inner = regroup(inner, groups)
    inputs = geometry.in_channels // groups
    shape = (geometry.out_channels, inputs, *(axis.kernel for axis in geometry.axes))
    result = torch.zeros(shape, dtype=torch.float64, device=outer.weight.device)
    # Output channels of several groups read different ones of the inner map.
    parts = slabs(outer.weight) if outer_groups == 1 else [(slice(None), outer.weight.double())]
    for place, weight in parts:
        _add_composed(result[place], weight, outer.geometry, inner, geometry)
    return result


def _add_composed(total: Tensor, weight: Tensor, outer: Geometry, inner: ConvMap, geometry: Geometry) -> None:
    """Add the composition of ``weight`` with ``inner`` in place, one matrix product per tap of the smaller kernel."""
    taps_out = weight.flatten(2) if outer.axes else weight.unsqueeze(2)
    taps_in = inner.weight.flatten(2) if inner.geometry.axes else inner.weight.unsqueeze(2)
    kernel_out, kernel_in = tuple(weight.shape[2:]), tuple(inner.weight.shape[2:])
    # Each pair of taps lands where their offsets add up; walk over the fewer taps, slices take the others at once.
    over_outer = taps_out.shape[2] <= taps_in.shape[2]
    for index in range(min(taps_out.shape[2], taps_in.shape[2])):
        if over_outer:
            product = _channel_product(taps_out[:, :, index : index + 1], taps_in, outer.groups, inner.groups)
            shape, places = kernel_in, _tap_places(geometry, inner.geometry, outer, index, inner_moves=True)
        else:
            product = _channel_product(taps_out, taps_in[:, :, index : index + 1], outer.groups, inner.groups)
            shape, places = kernel_out, _tap_places(geometry, inner.geometry, outer, index, inner_moves=False)
        total[(slice(None), slice(None), *places)].add_(product.reshape(*product.shape[:2], *shape))


def _tap_places(
    geometry: Geometry, inner: Geometry, outer: Geometry, index: int, *, inner_moves: bool
) -> tuple[slice, ...]:
    """Return where the moving kernel's taps land beside tap ``index`` of the other kernel."""
    fixed, moving = (outer, inner) if inner_moves else (inner, outer)
    places = []
    for axis, fixed_axis, moving_axis, inner_axis in zip(
        reversed(geometry.axes), reversed(fixed.axes), reversed(moving.axes), reversed(inner.axes), strict=True
    ):
        if geometry.transposed:
            places.append(slice(0, axis.kernel))
            continue
        index, tap = divmod(index, fixed_axis.kernel)
        fixed_scale, moving_scale = (inner_axis.stride, 1) if inner_moves else (1, inner_axis.stride)
        start = tap * fixed_axis.dilation * fixed_scale // axis.dilation
        step = max(moving_axis.dilation * moving_scale // axis.dilation, 1)
        places.append(slice(start, start + (moving_axis.kernel - 1) * step + 1, step))
    return tuple(reversed(places))


def _channel_product(outer: Tensor, inner: Tensor, outer_groups: int, inner_groups: int) -> Tensor:
    """Return ``sum_m outer[o, m, to] * inner[m, i, ti]`` for every (to, ti), of which one has a single tap.

    One of the group counts divides the other, so no product with a structural zero is computed.
    """
    (outputs, middle_out, taps_out), (middle, inputs, taps_in) = outer.shape, inner.shape
    batches = max(outer_groups, inner_groups)
    if outer_groups >= inner_groups:
        left = outer.reshape(batches, outputs // batches, middle_out, taps_out)
        right = inner.reshape(batches, middle // batches, inputs, taps_in)
        product = _summed("bomt,bmis->boits", left, right)
        return product.reshape(outputs, inputs, taps_out * taps_in)
    ratio = inner_groups // outer_groups
    left = outer.reshape(outer_groups, outputs // outer_groups, ratio, middle_out // ratio, taps_out)
    right = inner.reshape(outer_groups, ratio, middle // inner_groups, inputs, taps_in)
    product = _summed("gormt,grmis->gorits", left, right)
    return product.reshape(outputs, ratio * inputs, taps_out * taps_in)


def _summed(equation: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over ``m``; of a single value by multiplication, in a quarter of a matrix product's memory."""
    axes = [operand.index("m") for operand in equation.split("->")[0].split(",")]
    if left.shape[axes[0]] == 1:
        left, right, equation = left.squeeze(axes[0]), right.squeeze(axes[1]), equation.replace("m", "")
    return torch.einsum(equation, left, right)


def concatenate(parts: tuple[ConvMap, ...], sizes: Sizes | None = None) -> ConvMap:
    """Return the outputs of ``parts`` side by side along the channels, all on the same input.

    Exact where strides and output shapes agree; stays grouped where the parts are a grouped convolution's groups.
    """
    geometry = concatenate_geometry(tuple(p.geometry for p in parts), _sizes(parts[0], sizes))
    rows = []
    for part in parts:
        if geometry.groups == 1:
            rows.append(_onto(part, geometry).weight)
        else:
            block = geometry.in_channels // geometry.groups
            grouped = regroup(part, part.geometry.in_channels // block)
            rows.append(embed(grouped, geometry.axes).weight)
    return ConvMap(torch.cat(rows), torch.cat([p.bias for p in parts]), geometry)


def select(inner: ConvMap, start: int, stop: int) -> ConvMap:
    """Return output channels ``[start, stop)`` of ``inner``; whole groups read only their own inputs."""
    if (start, stop) == (0, inner.geometry.out_channels):
        return inner
    geometry = select_geometry(inner.geometry, start, stop)
    rows, bias = inner.weight[start:stop], inner.bias[start:stop]
    if geometry.weight_shape == tuple(rows.shape):
        return ConvMap(rows, bias, geometry)
    dense = regroup(inner, 1).weight[start:stop]
    return ConvMap(dense, bias, geometry)


def _sizes(inner: ConvMap, sizes: Sizes | None) -> Sizes:
    return (None,) * len(inner.geometry.axes) if sizes is None else sizes


__all__ = ["compose", "concatenate", "embed", "fold", "merge", "regroup", "select", "subtract", "widen"]
