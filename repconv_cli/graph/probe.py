"""The kernel of linear operators that no rule knows, read off their Jacobian.

An affine map ``y = J x + b`` is a convolution if the rows of ``J`` for one output position are those for another,
shifted. So the rows at an inner position are the kernel, and what remains is to check it: at random inputs, at every
position, like any certificate. What is no convolution fails there and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import Axis, ConvMap, Geometry
from repconv_cli.errors import InexactError
from repconv_cli.graph.interpret import Constants, run_node
from repconv_cli.graph.rules.registry import RULES, Step, kernel_name
from repconv_cli.graph.terms import Anchor, Leaf, Term, apply_leaf

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


def region_between(anchor: fx.Node, node: fx.Node, constants: Constants) -> list[fx.Node]:
    """Return the nodes from ``anchor`` (without it) to ``node``, in graph order."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is not anchor and current not in found and current not in constants:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return sorted(found)


def probe(anchor: fx.Node, region: list[fx.Node], constants: Constants, axis: int) -> ConvMap:
    """Return the affine map from ``anchor`` to the end of ``region`` as a convolution with channels on ``axis``.

    Raises :class:`InexactError` where it is none, or where its kernel would be too large to find out.
    """
    shape: tuple[int, ...] = anchor.meta["shape"]
    dims = len(shape) - 2 if axis == 1 else 0

    def run_at(constants: Constants) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {anchor: x}
            for node in region:
                values[node] = run_node(node, lambda n: values[n] if n in values else constants.value(n))
            found: Tensor = values[region[-1]]
            return found

        return run

    with torch.enable_grad():
        rows = _Rows(run_at(constants), shape, axis, dims)
        geometry, windows = rows.geometry(anchor.meta["free"])
        weight = rows.kernel(geometry, windows)
    grouped = _grouped(ConvMap(weight, rows.bias(), geometry))
    _check(run_at(constants), grouped, shape, axis)
    if any(anchor.meta["free"][1:]):
        _check_elsewhere(run_at, grouped, anchor, axis, constants)
    return grouped


class _Rows:
    """Rows of the Jacobian of ``run`` at zero, and what they say of a kernel."""

    def __init__(self, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], axis: int, dims: int) -> None:
        self.axis, self.dims = axis, dims
        self.x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.y = run(self.x)
        sizes = self.y.shape
        if self.y.ndim != len(shape) or sizes[0] != shape[0] or (not dims and sizes[1:-1] != shape[1:-1]):
            raise InexactError("an output that is no image of its input")
        if self.y.grad_fn is None:
            raise InexactError("an output that does not depend on its input")
        self.outputs, self.inputs = sizes[axis], shape[axis]
        self.spatial = tuple(sizes[2 : 2 + dims])
        self.middle = tuple(size // 2 for size in self.spatial)

    def reach(self, place: tuple[int, ...]) -> Tensor:
        """Return where the outputs at ``place`` read, whatever their channel: at random weights nothing cancels."""
        weights = torch.randn(self.outputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return self._gradient((weights * self._values(place)).sum()).abs().sum(0)

    def row(self, channel: int) -> Tensor:
        """Return d y[0, channel, middle] / d x, channels first."""
        return self._gradient(self._values(self.middle)[channel])

    def _values(self, place: tuple[int, ...]) -> Tensor:
        values = self.y.movedim(self.axis, 1)[0]
        for index in reversed(place):
            values = values[..., index]
        return values.flatten(1)[:, 0] if values.ndim > 1 else values

    def _gradient(self, value: Tensor) -> Tensor:
        """Return d value / d x of the first sample; other samples must not matter."""
        (gradient,) = torch.autograd.grad(value, self.x, retain_graph=True)
        found: Tensor = gradient.movedim(self.axis, 1)
        if bool(found[1:].any()):
            raise InexactError("a sample that depends on another")
        return found[0]

    def bias(self) -> Tensor:
        """Return the constant that is added to each channel."""
        flat = self.y.detach().movedim(self.axis, 0).flatten(1)
        if bool((flat != flat[:, :1]).any()):
            raise InexactError("a constant that differs from place to place")
        return flat[:, 0].clone()

    def geometry(self, free: tuple[bool, ...]) -> tuple[Geometry, tuple[slice, ...]]:
        """Return the geometry, ungrouped, and the window of the input that the middle output reads."""
        if not self.dims:
            return Geometry(self.outputs, self.inputs), ()
        spans = [_span(self.reach(self.middle))]
        for index in range(self.dims):
            place = tuple(p + (i == index and self.spatial[index] > 1) for i, p in enumerate(self.middle))
            if place[index] >= self.spatial[index]:
                place = tuple(p - (i == index) for i, p in enumerate(self.middle))
            spans.append(_span(self.reach(place)))
        axes = []
        for index in range(self.dims):
            (start, stop, step), (moved, _, _) = spans[0][index], spans[1 + index][index]
            size, count = self.x.shape[2 + index], self.spatial[index]
            stride = abs(moved - start) if count > 1 else size
            if stride < 1:
                raise InexactError("outputs that read the same place")
            low = stride * self.middle[index] - start
            extent = stop - start
            high = (count - 1) * stride + extent - size - low
            # With a free size the padding behind must hold for any: the published one, as much as before.
            if free[2 + index] and 0 <= low - high < stride:
                high = low
            axes.append(Axis((extent - 1) // step + 1, stride, step, low, high))
        if self.outputs * self.inputs * prod(axis.kernel for axis in axes) > MAX_KERNEL:
            raise InexactError("a kernel too large to probe")
        return Geometry(self.outputs, self.inputs, 1, tuple(axes)), tuple(slice(*span) for span in spans[0])

    def kernel(self, geometry: Geometry, windows: tuple[slice, ...]) -> Tensor:
        """Return the weight, one row of the Jacobian for each output channel."""
        if self.outputs * self.inputs > MAX_KERNEL:
            raise InexactError("a kernel too large to probe")
        rows = [self.row(channel) for channel in range(self.outputs)]
        if not self.dims:
            return torch.stack([row.flatten(1).sum(1) for row in rows])
        weight = torch.stack([row[(slice(None), *windows)] for row in rows])
        assert tuple(weight.shape) == geometry.weight_shape
        return weight


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
    strides = [a.stride for a in found.geometry.axes]
    places = {constants.shape(anchor)[1:]}
    for other in constants.elsewhere:
        shape = other.shape(anchor)
        if shape[1:] not in places:
            _check(run_at(other), found, shape, axis)
            places.add(shape[1:])
    is_free = anchor.meta["free"][2:]
    for index, stride in enumerate(strides):
        seen = {shape[1 + index] % stride for shape in places}
        if is_free[index] and len(seen) < stride:
            raise InexactError("not checked at every remainder by the stride")
    if len(places) < MIN_PLACES:
        raise InexactError("not checked at other sizes")


def _check(run: Callable[[Tensor], Tensor], found: ConvMap, shape: tuple[int, ...], axis: int) -> None:
    """Compare the map with the operators at a random input, at every position."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    magnitude = ConvMap(found.weight.abs(), found.bias.abs(), found.geometry)
    with torch.no_grad():
        expected = run(x)
        if not found.geometry.axes:
            moved = x.movedim(axis, -1).flatten(0, -2)
            computed, scale = found(moved), magnitude(moved.abs())
            expected = expected.movedim(axis, -1).flatten(0, -2)
        else:
            computed, scale = found(x), magnitude(x.abs())
    if computed.shape != expected.shape or bool(((computed - expected).abs() > _TOLERANCE * scale).any()):
        raise InexactError("not the same map at every place")
