"""Where a convolution reads: its taps, padding and groups, without its weights.

Everything here is integer arithmetic, so a plan can judge shapes and cost before any kernel exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import gcd, prod

from repconv_cli.errors import InexactError

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Output index ``j`` reads input indices ``stride * j + first + dilation * [0, kernel)``.
    ``low`` and ``high`` are the padding before and after; negative padding crops.

    >>> Axis(kernel=3, stride=2, low=1, high=1).output_size(9)
    5
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    low: int = 0
    high: int = 0

    @property
    def extent(self) -> int:
        """Number of input positions from the first tap to the last."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def first(self) -> int:
        """Offset of the first tap from ``stride * j``."""
        return -self.low

    @property
    def last(self) -> int:
        """Offset of the last tap from ``stride * j``."""
        return self.extent - 1 - self.low

    @property
    def slack(self) -> int:
        """``high - last``: with the stride, the only thing that decides the output size."""
        return self.high - self.last

    def output_size(self, size: int) -> int:
        """Return ``floor((size + low + high - extent) / stride) + 1``."""
        return (size + self.low + self.high - self.extent) // self.stride + 1

    def reads_outside(self, size: int | None) -> bool:
        """Whether some window reaches past the input; ``size`` None asks for any size."""
        return self.low > 0 or self.reads_after(size)

    def reads_after(self, size: int | None) -> bool:
        """Whether the last window reaches past the input's end: a stride may leave the padding there unread."""
        rest = 0 if size is None else (size + self.low + self.high - self.extent) % self.stride
        return self.high - rest > 0

    def is_pointwise(self) -> bool:
        """Whether output index ``j`` reads input index ``j`` alone."""
        return self == Axis()


@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution ``(O, I/groups, *kernel)`` over input channels ``[reads, reads + I)``.

    ``transposed`` marks a transposed convolution with a stride over 1; its ``high`` is
    ``padding - output_padding``. With stride 1 a transposed convolution is a plain one, and computed as a plain one:
    :meth:`as_transposed` is how it may be written.
    """

    out_channels: int
    in_channels: int
    groups: int = 1
    axes: tuple[Axis, ...] = ()
    padding_mode: str = "zeros"
    reads: int = 0
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1 or self.out_channels % self.groups or self.in_channels % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide out_channels={self.out_channels} and in_channels={self.in_channels}"
            )
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r}, needed one of {', '.join(PADDING_MODES)}")
        for axis in self.axes:
            if axis.kernel < 1 or axis.stride < 1 or axis.dilation < 1:
                raise ValueError(f"kernel, stride and dilation must be positive, found {axis}")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(O, I/groups, *kernel)``."""
        return (self.out_channels, self.in_channels // self.groups, *(axis.kernel for axis in self.axes))

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return prod(self.weight_shape)

    def output_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial output sizes for spatial input ``sizes``."""
        if self.transposed:
            return tuple(
                (size - 1) * axis.stride + axis.extent - axis.low - axis.high
                for axis, size in zip(self.axes, sizes, strict=True)
            )
        return tuple(axis.output_size(size) for axis, size in zip(self.axes, sizes, strict=True))

    def multiply_accumulates(self, sizes: tuple[int, ...]) -> int:
        """Return the multiply-accumulates for one sample with spatial input ``sizes``."""
        positions = prod(sizes if self.transposed else self.output_sizes(sizes))
        return self.parameters * positions

    def as_transposed(self) -> Geometry | None:
        """Return the marked form of a plain convolution with stride 1, whose kernel is the flipped one; None if none.

        ``padding' = dilation * (kernel - 1) - padding``, which torch's operator takes where it is the same on both
        sides and not negative.
        """
        axes = self.axes
        if self.transposed or self.padding_mode != "zeros" or any(a.stride > 1 or a.low != a.high for a in axes):
            return None
        if any(axis.low >= axis.extent for axis in axes):
            return None
        turned = (Axis(a.kernel, 1, a.dilation, a.extent - 1 - a.low, a.extent - 1 - a.high) for a in axes)
        return replace(self, axes=tuple(turned), transposed=True)

    def is_pointwise(self) -> bool:
        """Whether every output position reads the input at that position alone."""
        return not self.transposed and all(axis.is_pointwise() for axis in self.axes)

    def is_diagonal(self) -> bool:
        """Whether it is one factor per channel: pointwise, and each channel reads itself."""
        return self.is_pointwise() and self.groups == self.in_channels == self.out_channels and self.reads == 0

    def reads_outside(self, sizes: tuple[int | None, ...]) -> bool:
        """Whether some window reaches past the border of an input of spatial ``sizes``."""
        return any(axis.reads_outside(size) for axis, size in zip(self.axes, sizes, strict=True))


def regroup_geometry(geometry: Geometry, groups: int) -> Geometry:
    """Return the same map over fewer groups; ``groups`` must divide the present ones."""
    if geometry.groups % groups:
        raise ValueError(f"cannot regroup {geometry.groups} groups into {groups}")
    return replace(geometry, groups=groups)


def _union(axes: tuple[Axis, ...]) -> Axis:
    """Return the smallest regular lattice of taps that holds every axis' taps."""
    first, last = min(a.first for a in axes), max(a.last for a in axes)
    # A single tap has no step of its own, only its distance to the others.
    steps = [a.dilation for a in axes if a.kernel > 1] + [a.first - first for a in axes]
    step = reduce(gcd, steps, 0) or 1
    slack = max(a.slack for a in axes)
    return Axis((last - first) // step + 1, axes[0].stride, step, -first, slack + last)


def merge_geometry(left: Geometry, right: Geometry, sizes: tuple[int | None, ...]) -> Geometry:
    """Return the geometry of ``left + right``, two branches from one anchor with equal output shape.

    Taps are united by *offset*, so a 1x1 lands at index ``padding``. Raises :class:`InexactError` where
    the strides differ, or where padding of different modes is read.
    """
    if left.transposed or right.transposed:
        if replace(left, groups=1) != replace(right, groups=1):
            raise InexactError("a transposed convolution beside a branch of another geometry")
        return replace(left, groups=gcd(left.groups, right.groups))
    mode = _common_padding_mode((left, right), sizes)
    left, right = align_strides(left, right, sizes)
    if tuple(a.stride for a in left.axes) != tuple(a.stride for a in right.axes):
        raise InexactError(f"stride {_numbers(left)} beside stride {_numbers(right)}")
    _check_output_sizes((left, right), sizes)
    axes = tuple(_union(pair) for pair in zip(left.axes, right.axes, strict=True))
    reads, width, groups = _common_reads(left, right)
    return Geometry(left.out_channels, width, groups, axes, mode, reads)


def align_strides(left: Geometry, right: Geometry, sizes: tuple[int | None, ...]) -> tuple[Geometry, Geometry]:
    """Return both with a common stride on axes where the output has a single position, which has no stride."""
    pairs = []
    for a, b, size in zip(left.axes, right.axes, sizes, strict=True):
        if a.stride != b.stride and size is not None and a.output_size(size) == b.output_size(size) == 1:
            stride = max(a.stride, b.stride)
            pairs.append((replace(a, stride=stride), replace(b, stride=stride)))
        else:
            pairs.append((a, b))
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    return replace(left, axes=tuple(first)), replace(right, axes=tuple(second))


def _common_padding_mode(geometries: tuple[Geometry, ...], sizes: tuple[int | None, ...]) -> str:
    modes = {g.padding_mode for g in geometries if g.reads_outside(sizes)}
    if len(modes) > 1:
        raise InexactError(
            f"padding modes differ where kernels reach past the border: {' beside '.join(sorted(modes))}"
        )
    return modes.pop() if modes else "zeros"


def _check_output_sizes(parts: tuple[Geometry, ...], sizes: tuple[int | None, ...]) -> None:
    """Equal slacks give equal sizes for any input; with a stride, closer ones do for those inputs that allow it."""
    for index, size in enumerate(sizes):
        axes = [part.axes[index] for part in parts]
        if size is None:
            slacks = [axis.slack for axis in axes]
            if max(slacks) - min(slacks) >= axes[0].stride:
                raise InexactError("output sizes differ whatever the input size")
        else:
            outputs = [axis.output_size(size) for axis in axes]
            if len(set(outputs)) > 1:
                raise InexactError(f"output sizes {' beside '.join(map(str, outputs))} from input size {size}")


def _common_reads(left: Geometry, right: Geometry) -> tuple[int, int, int]:
    """Return (first channel, width, groups) that hold both branches."""
    if (left.reads, left.in_channels) == (right.reads, right.in_channels):
        return left.reads, left.in_channels, gcd(left.groups, right.groups)
    start = min(left.reads, right.reads)
    stop = max(left.reads + left.in_channels, right.reads + right.in_channels)
    return start, stop - start, 1


def _numbers(geometry: Geometry) -> str:
    return "×".join(str(axis.stride) for axis in geometry.axes)


def concatenate_geometry(parts: tuple[Geometry, ...], sizes: tuple[int | None, ...]) -> Geometry:
    """Return the geometry of the outputs of ``parts``, all on one anchor, side by side.

    Groups survive where the parts read adjacent channels in order and their group blocks have a common size.
    """
    first = parts[0]
    if any(p.transposed for p in parts):
        raise InexactError("a transposed convolution beside another in a concatenation")
    if any(tuple(a.stride for a in p.axes) != tuple(a.stride for a in first.axes) for p in parts):
        raise InexactError("different strides side by side")
    _check_output_sizes(parts, sizes)
    mode = _common_padding_mode(parts, sizes)
    axes = tuple(_union(tuple(p.axes[i] for p in parts)) for i in range(len(first.axes)))
    reads = min(p.reads for p in parts)
    width = max(p.reads + p.in_channels for p in parts) - reads
    out_channels = sum(p.out_channels for p in parts)
    return Geometry(out_channels, width, _adjacent_groups(parts), axes, mode, reads)


def _adjacent_groups(parts: tuple[Geometry, ...]) -> int:
    """Return the groups of a block-diagonal concatenation, or 1 if it is none."""
    position = parts[0].reads
    for part in parts:
        if part.reads != position:
            return 1
        position += part.in_channels
    total_in = sum(p.in_channels for p in parts)
    total_out = sum(p.out_channels for p in parts)
    if any(p.in_channels * total_out != p.out_channels * total_in for p in parts):
        return 1
    # Every block must be a whole number of each part's own blocks, and fit each part a whole number of times.
    block = reduce(lambda a, b: a * b // gcd(a, b), (p.in_channels // p.groups for p in parts))
    return total_in // block if all(p.in_channels % block == 0 for p in parts) else 1


def select_geometry(geometry: Geometry, start: int, stop: int) -> Geometry:
    """Return the geometry of output channels ``[start, stop)``; whole groups keep their groups and read less."""
    per_group = geometry.out_channels // geometry.groups
    if start % per_group == 0 and stop % per_group == 0 and not geometry.transposed:
        inputs = geometry.in_channels // geometry.groups
        groups = (stop - start) // per_group
        first_group = start // per_group
        return replace(
            geometry,
            out_channels=stop - start,
            in_channels=groups * inputs,
            groups=groups,
            reads=geometry.reads + first_group * inputs,
        )
    return replace(geometry, out_channels=stop - start, groups=1)
