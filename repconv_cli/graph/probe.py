"""The kernel of linear operators that no rule knows, read off their Jacobian.

An affine map ``y = J x + b`` is a convolution if the rows of ``J`` for one output position are those for another,
shifted. So the rows at an inner position are the kernel, and what remains is to check it: at random inputs, at every
position, like any certificate. What is no convolution fails there and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry
from repconv_cli.errors import InexactError
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.interpret import run_node
from repconv_cli.graph.jacobian import TOLERANCE, Jacobian
from repconv_cli.graph.rules.registry import RULES, Step, kernel_name, reads_what_is_same_elsewhere
from repconv_cli.graph.structure import structure_of
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
MAX_REGION = 64
MAX_TRIES = 2
MIN_PLACES = 3
MAX_STEPS = 4
MAX_AXES = 5


def linear_sources(node: fx.Node, constants: Constants) -> list[fx.Node] | None:
    """Return the tensors that ``node`` is affine in, or None where it is not affine."""
    variables = [source for source in node.all_input_nodes if source not in constants]
    if node.op != "call_function" or not variables:
        return None
    if constants.reads_fewer_digits(node) or not reads_what_is_same_elsewhere(node, constants):
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


def probed_step(
    node: fx.Node, anchors: Iterable[fx.Node], constants: Constants, failed: set[tuple[str | None, int]]
) -> Step | None:
    """Return the step of ``node`` on the nearest of ``anchors`` that it is a convolution of, or None.

    Only where a layer is near: without one nothing would be fused. ``failed`` holds, and is given, the structures that
    are no convolution with their channels on an axis.
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
        structure = structure_of(anchor, region, constants)
        for axis in axes:
            if (structure, axis) in failed:
                continue
            try:
                found = probe(anchor, region, constants, axis)
            except (InexactError, RuntimeError, IndexError):
                if structure is not None:
                    failed.add((structure, axis))
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
        jacobian = Jacobian(run_at(constants), _channels_first(shape, axis))
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
        _require_changes(region, constants)
        _check_elsewhere(run_at, found, anchor, axis, constants)
    return found if is_image else _without_axes(found)


def _channels_first(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (shape[0], shape[axis], *(size for index, size in enumerate(shape) if index not in (0, axis)))


def _without_axes(found: ConvMap) -> ConvMap:
    geometry = replace(found.geometry, axes=())
    return ConvMap(found.weight.reshape(geometry.weight_shape), found.bias, geometry)


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


def _require_changes(region: list[fx.Node], constants: Constants) -> None:
    """Require that each free size was another one somewhere: of one that grows later on nothing was seen."""
    for node in region:
        if "shape" not in node.meta:
            # Several tensors, each of which is picked in the region.
            continue
        shapes = [constants.shape(node), *(other.shape(node) for other in constants.elsewhere)]
        for axis, is_free in enumerate(node.meta["free"]):
            if axis and is_free and len({shape[axis] for shape in shapes}) == 1:
                raise InexactError("not checked at other sizes")


def _check(run: Callable[[Tensor], Tensor], found: ConvMap, shape: tuple[int, ...]) -> None:
    """Compare the map with the operators at a random input, at every position."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    magnitude = ConvMap(found.weight.abs(), found.bias.abs(), found.geometry)
    with torch.no_grad():
        expected, computed, scale = run(x), found(x), magnitude(x.abs())
    if computed.shape != expected.shape or bool((computed.sub_(expected).abs_() > scale.mul_(TOLERANCE)).any()):
        raise InexactError("not the same map at every place")
