"""The kernel of linear operators that no rule knows, read off their Jacobian.

An affine map ``y = J x + b`` is a convolution if the rows of ``J`` for one output position are those for another,
shifted. So the rows at an inner position are the kernel, and what remains is to check it: at random inputs, at every
position, like any certificate. What is no convolution fails there and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import Axis, ConvMap, Geometry
from repconv_cli.errors import InexactError
from repconv_cli.graph.interpret import Constants, region_between, run_node
from repconv_cli.graph.rules.registry import RULES, Step, kernel_name
from repconv_cli.graph.term import Anchor, Leaf, Term
from repconv_cli.graph.terms import apply_leaf

# Affine in all tensors that they read.
_LINEAR = """
add sub rsub neg clone contiguous alias copy cat stack sum mean cumsum flatten unflatten reshape view permute transpose
t movedim squeeze unsqueeze expand repeat tile select slice narrow split split_with_sizes chunk unbind roll flip pad
constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle pixel_unshuffle
channel_shuffle diagonal slice_scatter select_scatter im2col col2im avg_pool1d avg_pool2d avg_pool3d
adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
upsample_bilinear2d upsample_linear1d
"""
# Affine in one tensor, where all others are constants.
_MULTILINEAR = """
mul div mm bmm matmul mv addmm baddbmm linear einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d
conv_transpose3d index_select gather index addcmul lerp batch_norm
"""
LINEAR, MULTILINEAR = frozenset(_LINEAR.split()), frozenset(_MULTILINEAR.split())
_CONVOLUTIONS = {name for name in MULTILINEAR if name.startswith("conv")} | {"batch_norm"}
_PRODUCTS = {"linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum"}
# A kernel larger than this is not worth the rows of a Jacobian.
MAX_KERNEL = 2**22
MAX_REGION = 64
MAX_TRIES = 2
MIN_PLACES = 3
MAX_STEPS = 4
MAX_AXES = 5
_TOLERANCE = 1e-12


def linear_sources(node: fx.Node, constants: Constants) -> list[fx.Node] | None:
    """Return the tensors that ``node`` is affine in, or None where it is not affine."""
    variables = [source for source in node.all_input_nodes if source not in constants]
    if node.op != "call_function" or not variables:
        return None
    if getattr(node.target, "__name__", "") == "getitem":
        return variables
    name = _name(node)
    if name == "batch_norm" and node.args[5]:
        return None
    if name == "div" and node.args[1] in variables:
        return None
    is_affine = name in LINEAR or (name in MULTILINEAR and len(variables) == 1)
    return variables if is_affine else None


def probed_step(node: fx.Node, anchors: Iterable[fx.Node], constants: Constants) -> Step | None:
    """Return the step of ``node`` on the nearest of ``anchors`` that it is a convolution of, or None.

    Only where a layer is near: without one nothing would be fused.
    """
    shape = node.meta["shape"]
    if len(shape) > MAX_AXES or not _is_read_as_an_image(node, constants):
        return None
    tried = 0
    for anchor in anchors:
        if anchor is node or len(anchor.meta["shape"]) != len(shape) or anchor.meta["dtype"] != node.meta["dtype"]:
            continue
        region = region_between(anchor, node, constants)
        inside = {_name(n) for n in region}
        near = inside | _names_after(node, constants)
        axes = [1] if near & (_CONVOLUTIONS | _PRODUCTS) else []
        axes += [len(shape) - 1] if near & _PRODUCTS and len(shape) > 2 else []
        if len(region) > MAX_REGION or not axes or tried == MAX_TRIES:
            return None
        tried += 1
        for axis in axes:
            try:
                found = probe(anchor, region, constants, axis)
            except (InexactError, RuntimeError):
                continue
            return _as_step(anchor, found, axis, bool(inside & (_CONVOLUTIONS | _PRODUCTS)))
    return None


def _as_step(anchor: fx.Node, found: ConvMap, axis: int, holds_layer: bool) -> Step:
    geometry = found.geometry
    kernel = ConvMap(found.weight, torch.zeros_like(found.bias), geometry)
    leaf = Leaf(geometry, lambda: kernel, found.bias, is_layer=holds_layer)

    def combine(terms: tuple[Term, ...], at: Anchor) -> Term:
        # Values that are only moved or averaged are no kernel that somebody would expect to be fused.
        return replace(apply_leaf(leaf, terms[0], axis, at), kernels=terms[0].kernels + holds_layer)

    return Step((anchor,), combine, label=kernel_name(tuple(a.kernel for a in geometry.axes)))


def _is_read_as_an_image(node: fx.Node, constants: Constants) -> bool:
    """Whether more than another step on the way reads it."""
    return any(user.target in RULES or linear_sources(user, constants) is None for user in node.users)


def _names_after(node: fx.Node, constants: Constants) -> set[str]:
    """Return the operators that read it, at most a few affine operators later."""
    names: set[str] = set()
    reached = {node}
    for _ in range(MAX_STEPS):
        reached = {user for n in reached for user in n.users if linear_sources(user, constants) is not None}
        names |= {_name(n) for n in reached}
    return names


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""


def probe(anchor: fx.Node, region: list[fx.Node], constants: Constants, axis: int) -> ConvMap:
    """Return the affine map from ``anchor`` to the end of ``region`` as a convolution with channels on ``axis``.

    Raises :class:`InexactError` where it is none, or where its kernel would be too large to find out.
    """
    shape: tuple[int, ...] = anchor.meta["shape"]

    def run_at(constants: Constants) -> Callable[[Tensor], Tensor]:
        """Return the region as a function, channels on axis 1."""

        def run(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {anchor: x.movedim(1, axis)}
            for node in region:
                values[node] = run_node(node, lambda n: values[n] if n in values else constants.value(n))
            found: Tensor = values[region[-1]]
            return found.movedim(axis, 1)

        return run

    with torch.enable_grad():
        jacobian = _Jacobian(run_at(constants), _channels_first(shape, axis))
        axes = jacobian.axes(anchor.meta["free"] if axis == 1 else (False,) * len(shape))
        is_image = axis == 1 and len(shape) > 2
        if not is_image and not all(a.is_pointwise() for a in axes):
            raise InexactError("a map that mixes positions")
        bias = jacobian.bias()
        if (weight := jacobian.depthwise(axes)) is not None:
            found = ConvMap(weight, bias, Geometry(len(weight), len(weight), len(weight), axes))
        else:
            weight = jacobian.kernel(axes)
            found = _grouped(ConvMap(weight, bias, Geometry(len(weight), shape[axis], 1, axes)))
    _check(run_at(constants), found, _channels_first(shape, axis))
    if any(anchor.meta["free"][1:]):
        _check_elsewhere(run_at, found, anchor, axis, constants)
    return found if is_image else _without_axes(found)


def _channels_first(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (shape[0], shape[axis], *(size for index, size in enumerate(shape) if index not in (0, axis)))


def _without_axes(found: ConvMap) -> ConvMap:
    geometry = replace(found.geometry, axes=())
    return ConvMap(found.weight.reshape(geometry.weight_shape), found.bias, geometry)


class _Jacobian:
    """The Jacobian of ``run`` at zero, by rows: where outputs read, and with which weights.

    ``run`` takes and gives ``(N, C, *positions)``.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.y = run(self.x)
        if self.y.ndim != len(shape) or self.y.shape[0] != shape[0] or self.y.grad_fn is None:
            raise InexactError("an output that is no image of its input")
        self.sizes, self.counts = shape[2:], tuple(self.y.shape[2:])
        self.middle = tuple(count // 2 for count in self.counts)
        generator = torch.Generator().manual_seed(0)
        self.mixture = torch.randn(self.y.shape[1], generator=generator, dtype=torch.float64)

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return ``cotangent @ J``, of the shape of ``x``."""
        (found,) = torch.autograd.grad(self.y, self.x, cotangent, retain_graph=True)
        return found

    def mixed_row(self, place: tuple[int, ...]) -> Tensor:
        """Return a random mixture of the rows of all channels at ``place``: nothing cancels in it.

        It stands for the first sample; the others must not be read.
        """
        cotangent = torch.zeros_like(self.y)
        index: tuple[Any, ...] = (0, slice(None), *place)
        cotangent[index] = self.mixture
        found = self.gradient(cotangent)
        if bool(found[1:].any()):
            raise InexactError("a sample that depends on another")
        return found[0]

    def bias(self) -> Tensor:
        """Return the constant that is added to each channel."""
        flat = self.y.detach().transpose(0, 1).flatten(1)
        if bool((flat != flat[:, :1]).any()):
            raise InexactError("a constant that differs from place to place")
        return flat[:, 0].clone()

    def axes(self, free: tuple[bool, ...]) -> tuple[Axis, ...]:
        """Return where the outputs read, along each axis; the same mixture of rows must be found at several places."""
        middle = self.mixed_row(self.middle)
        spans = _span(middle.abs().sum(0))
        axes = []
        for index, (start, stop, step) in enumerate(spans):
            size, count = self.sizes[index], self.counts[index]
            stride = size if count == 1 else self._stride(index, start)
            low = stride * self.middle[index] - start
            extent = stop - start
            high = (count - 1) * stride + extent - size - low
            # With a free size the padding behind must hold for any: the published one, as much as before.
            if free[2 + index] and 0 <= low - high < stride:
                high = low
            axes.append(Axis((extent - 1) // step + 1, stride, step, low, high))
        if axes and self.counts != self.sizes and all(count == 1 for count in self.counts):
            raise InexactError("one output that reads all positions")
        found = tuple(axes)
        window = middle[(slice(None), *(slice(start, stop) for start, stop, _ in spans))]
        for place in {(0,) * len(axes), tuple(count - 1 for count in self.counts)}:
            expected = self._placed(window, place, found)
            if bool(((self.mixed_row(place) - expected).abs() > _TOLERANCE * window.abs().max()).any()):
                raise InexactError("rows that are not the same everywhere")
        return found

    def _stride(self, index: int, start: int) -> int:
        step = 1 if self.middle[index] + 1 < self.counts[index] else -1
        place = tuple(p + step * (i == index) for i, p in enumerate(self.middle))
        moved, _, _ = _span(self.mixed_row(place).abs().sum(0))[index]
        if (moved - start) * step < 1:
            raise InexactError("outputs that read the same place")
        return (moved - start) * step

    def _placed(self, window: Tensor, place: tuple[int, ...], axes: tuple[Axis, ...]) -> Tensor:
        """Return an input with ``window`` where the outputs at ``place`` read, as far as that lies inside."""
        found = torch.zeros(self.x.shape[1:], dtype=torch.float64)
        into, out = [slice(0, None)], [slice(0, None)]
        for axis, at, size, width in zip(axes, place, self.sizes, window.shape[1:], strict=True):
            start = axis.stride * at - axis.low
            into.append(slice(max(start, 0), max(min(start + width, size), 0)))
            out.append(slice(max(-start, 0), max(min(width, size - start), 0)))
        found[tuple(into)] = window[tuple(out)]
        return found

    def depthwise(self, axes: tuple[Axis, ...]) -> Tensor | None:
        """Return the weight if each channel reads itself alone, all rows in one gradient; None if that is not so."""
        if self.y.shape[1] != self.x.shape[1]:
            return None
        all_channels = torch.zeros_like(self.y)
        index: tuple[Any, ...] = (0, slice(None), *self.middle)
        all_channels[index] = 1.0
        weight = self._window(self.gradient(all_channels)[0], self.middle, axes).unsqueeze(1)
        mixed = self._window(self.mixed_row(self.middle), self.middle, axes)
        expected = weight.squeeze(1) * self.mixture.reshape(-1, *(1,) * len(axes))
        return weight if torch.allclose(mixed, expected, rtol=1e-12, atol=0.0) else None

    def kernel(self, axes: tuple[Axis, ...]) -> Tensor:
        """Return the weight, a row of the Jacobian for each output channel.

        A gradient gives as many rows as there are places whose windows do not touch.
        """
        outputs, inputs = self.y.shape[1], self.x.shape[1]
        if outputs * inputs * prod(axis.kernel for axis in axes) > MAX_KERNEL:
            raise InexactError("a kernel too large to probe")
        slots = [(sample, *place) for sample in range(self.y.shape[0]) for place in self._apart(axes)]
        rows: list[Tensor] = []
        for first in range(0, outputs, len(slots)):
            taken = list(zip(range(first, outputs), slots, strict=False))
            cotangent = torch.zeros_like(self.y)
            for channel, (sample, *place) in taken:
                cotangent[(sample, channel, *place)] = 1.0
            found = self.gradient(cotangent)
            rows.extend(self._window(found[sample], tuple(place), axes) for _, (sample, *place) in taken)
        return torch.stack(rows)

    def _apart(self, axes: tuple[Axis, ...]) -> list[tuple[int, ...]]:
        """Return places whose windows lie inside and do not touch; the middle alone if there are none."""
        ranges = []
        for axis, size, count in zip(axes, self.sizes, self.counts, strict=True):
            inside = [at for at in range(count) if 0 <= axis.stride * at - axis.low <= size - axis.extent]
            ranges.append(inside[:: -(-axis.extent // axis.stride)])
        return list(product(*ranges)) or [self.middle]

    def _window(self, row: Tensor, place: tuple[int, ...], axes: tuple[Axis, ...]) -> Tensor:
        starts = [axis.stride * at - axis.low for axis, at in zip(axes, place, strict=True)]
        return row[
            (
                slice(None),
                *(slice(start, start + axis.extent, axis.dilation) for start, axis in zip(starts, axes, strict=True)),
            )
        ]


def _span(magnitudes: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return the first and one past the last index that is not zero, and their common step, along each axis."""
    spans = []
    for axis in range(magnitudes.ndim):
        others = [i for i in range(magnitudes.ndim) if i != axis]
        used = (magnitudes.amax(others) if others else magnitudes).nonzero()
        if not len(used):
            raise InexactError("an output that reads nothing")
        places = used.flatten().tolist()
        spans.append((places[0], places[-1] + 1, gcd(*(place - places[0] for place in places)) or 1))
    return tuple(spans)


def _grouped(dense: ConvMap) -> ConvMap:
    """Return ``dense`` over as many groups as its zeros allow."""
    geometry = dense.geometry
    reads = (dense.weight != 0).flatten(2).any(2) if geometry.axes else dense.weight != 0
    for groups in _divisors(geometry.out_channels, geometry.in_channels):
        outputs, inputs = geometry.out_channels // groups, geometry.in_channels // groups
        blocks = reads.reshape(groups, outputs, groups, inputs).any(3).any(1)
        if bool((blocks & ~torch.eye(groups, dtype=torch.bool)).any()):
            continue
        parts = dense.weight.reshape(groups, outputs, groups, inputs, *dense.weight.shape[2:])
        weight = torch.stack([parts[group, :, group] for group in range(groups)]).flatten(0, 1)
        return ConvMap(weight, dense.bias, Geometry(geometry.out_channels, geometry.in_channels, groups, geometry.axes))
    raise AssertionError("one group always fits")


def _divisors(*numbers: int) -> Iterable[int]:
    return (g for g in range(min(numbers), 0, -1) if all(number % g == 0 for number in numbers))


def _check_elsewhere(
    run_at: Callable[[Constants], Callable[[Tensor], Tensor]],
    found: ConvMap,
    anchor: fx.Node,
    axis: int,
    constants: Constants,
) -> None:
    """Check the map at other choices of the free sizes: one for each remainder by the stride, and two at least.

    A mean over all positions, or a place counted from the far end, is a kernel at one size and another at the next.
    """
    places = {_channels_first(constants.shape(anchor), axis)[2:]}
    for other in constants.elsewhere:
        shape = _channels_first(other.shape(anchor), axis)
        if shape[2:] not in places:
            _check(run_at(other), found, shape)
            places.add(shape[2:])
    is_free = _channels_first(anchor.meta["free"], axis)[2:]
    for index, a in enumerate(found.geometry.axes):
        if is_free[index] and len({place[index] % a.stride for place in places}) < a.stride:
            raise InexactError("not checked at every remainder by the stride")
    if len(places) < MIN_PLACES:
        raise InexactError("not checked at other sizes")


def _check(run: Callable[[Tensor], Tensor], found: ConvMap, shape: tuple[int, ...]) -> None:
    """Compare the map with the operators at a random input, at every position."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    magnitude = ConvMap(found.weight.abs(), found.bias.abs(), found.geometry)
    with torch.no_grad():
        expected, computed, scale = run(x), found(x), magnitude(x.abs())
    if computed.shape != expected.shape or bool(((computed - expected).abs() > _TOLERANCE * scale).any()):
        raise InexactError("not the same map at every place")
