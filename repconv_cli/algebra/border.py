"""The border rule: when a map may be evaluated where another map's padding would be read.

``outer`` with padding reads its own padding outside ``inner``'s output, while the composed convolution reads
``inner`` *evaluated* outside. The rule below says when these agree for the linear parts; a constant (bias) that
``inner`` adds is judged separately, as a field over the output, by whoever composes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from math import gcd

from repconv_cli.algebra.geometry import Axis, Geometry
from repconv_cli.errors import InexactError


def compose_geometry(outer: Geometry, inner: Geometry, sizes: tuple[int | None, ...]) -> Geometry:
    """Return the geometry of the linear part of ``outer(inner(x))`` for spatial input ``sizes``.

    ``None`` stands for a size that stays free. Raises :class:`InexactError` with the reason where no
    single convolution reads the same values: see :mod:`repconv_cli.algebra.border`.
    """
    if outer.in_channels != inner.out_channels:
        raise ValueError(f"outer reads {outer.in_channels} channels, inner gives {inner.out_channels}")
    if outer.transposed or inner.transposed:
        return _compose_transposed(outer, inner)
    mode = composed_padding_mode(outer, inner, sizes)
    axes = tuple(_compose_axis(o, i) for o, i in zip(outer.axes, inner.axes, strict=True))
    return Geometry(outer.out_channels, inner.in_channels, gcd(outer.groups, inner.groups), axes, mode, inner.reads)


def _compose_axis(outer: Axis, inner: Axis) -> Axis:
    """Taps add up: ``first_i + stride_i * first_o``; so do the slacks, which fix the output size for any input."""
    first = inner.first + inner.stride * outer.first
    last = inner.last + inner.stride * outer.last
    steps = [
        axis_step
        for axis_step, taps in ((inner.dilation, inner.kernel), (inner.stride * outer.dilation, outer.kernel))
        if taps > 1
    ]
    step = reduce(gcd, steps, 0) or 1
    slack = inner.slack + inner.stride * outer.slack
    return Axis((last - first) // step + 1, inner.stride * outer.stride, step, -first, slack + last)


def _compose_transposed(outer: Geometry, inner: Geometry) -> Geometry:
    if outer.transposed and not inner.transposed and inner.is_pointwise():
        groups = gcd(outer.groups, inner.groups)
        return replace(outer, in_channels=inner.in_channels, groups=groups, reads=inner.reads)
    if not inner.transposed or not outer.is_pointwise():
        raise InexactError("a transposed convolution with stride over 1 takes pointwise maps before and after it only")
    return replace(inner, out_channels=outer.out_channels, groups=gcd(outer.groups, inner.groups))


def composed_padding_mode(outer: Geometry, inner: Geometry, sizes: tuple[int | None, ...]) -> str:
    """Return the padding mode of ``outer @ inner``; raise :class:`InexactError` if no mode makes it exact.

    Zeros after zeros is exact where every window of ``inner`` outside its output reads only zeros. Another mode
    after a pointwise map commutes with it; circular after circular is a convolution on the torus.
    """
    middle = tuple(
        None if size is None else axis.output_size(size) for axis, size in zip(inner.axes, sizes, strict=True)
    )
    outer_reads = outer.reads_outside(middle)
    inner_reads = inner.reads_outside(sizes)
    if not outer_reads:
        return inner.padding_mode if inner_reads else "zeros"
    if inner.is_pointwise():
        return outer.padding_mode
    if outer.padding_mode == "zeros":
        if inner_reads and inner.padding_mode != "zeros":
            raise InexactError(f"{inner.padding_mode} padding inside zero padding")
        for outer_axis, inner_axis, size in zip(outer.axes, inner.axes, sizes, strict=True):
            _check_zero_border(outer_axis, inner_axis, size)
        return "zeros"
    if outer.padding_mode == inner.padding_mode == "circular" and _is_torus(inner):
        return "circular"
    raise InexactError(f"{outer.padding_mode} padding after a {_kernel(inner)} convolution")


def _check_zero_border(outer: Axis, inner: Axis, size: int | None) -> None:
    """Exact if no window of ``inner`` next to its output touches real input, before and after."""
    rest = inner.stride - 1 if size is None else (size + inner.low + inner.high - inner.extent) % inner.stride
    middle = None if size is None else inner.output_size(size)
    if outer.low > 0 and inner.last >= inner.stride:
        raise InexactError(
            f"zero padding {outer.low} before reads a {inner.kernel}-wide kernel outside its output "
            f"(it would still touch {inner.last - inner.stride + 1} input rows)"
        )
    overhang = inner.extent - 1 - inner.high
    if outer.reads_after(middle) and overhang >= inner.stride - rest:
        at_size = "for some input sizes" if size is None else f"at input size {size}"
        raise InexactError(
            f"zero padding {outer.high} after reads a {inner.kernel}-wide kernel of stride {inner.stride} outside "
            f"its output {at_size} (it would still touch {overhang - (inner.stride - rest) + 1} input rows)"
        )


def _is_torus(inner: Geometry) -> bool:
    """Whether ``inner`` maps a circle to the same circle: stride 1 and as many outputs as inputs."""
    return all(axis.stride == 1 and axis.slack == 0 for axis in inner.axes)


def _kernel(geometry: Geometry) -> str:
    return "×".join(str(axis.kernel) for axis in geometry.axes)
