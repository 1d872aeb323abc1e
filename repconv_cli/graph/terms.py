"""``Term``: what a node computes from its anchor, a linear part (a convolution) plus a constant field.

The geometry and the constant are known at once; the kernel is a recipe, computed only for what is taken.
A step between may be no convolution (a padded constant, a border written over): the constant is then a field over
the output. When the field is uniform again, the term is a ``ConvMap``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry, compose, concatenate, fold, merge, scale_map, select
from repconv_cli.algebra.border import compose_geometry
from repconv_cli.algebra.geometry import (
    Axis,
    concatenate_geometry,
    merge_geometry,
    regroup_geometry,
    select_geometry,
)
from repconv_cli.algebra.operations import through
from repconv_cli.errors import InexactError
from repconv_cli.graph.arrange import Layout, Size, moves, reshaped, unmoved

# Two ways to compute one constant (a norm's shift, a border's value) differ by float64 rounding and no more.
_FIELD_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to compute a kernel from the kernels of other recipes; constants (biases) are kept elsewhere."""

    make: Callable[[list[ConvMap]], ConvMap]
    inputs: tuple[Recipe, ...] = ()

    def compute(self) -> ConvMap:
        """Return the kernel as a map without bias.

        Every shared recipe is computed once, without recursion, and kept no longer than another one needs it.
        """
        order = self._in_order()
        waiting = Counter(id(source) for recipe in order for source in recipe.inputs)
        done: dict[int, ConvMap] = {}
        for recipe in order:
            maps = [done[id(source)] for source in recipe.inputs]
            for source in recipe.inputs:
                waiting[id(source)] -= 1
                if not waiting[id(source)]:
                    del done[id(source)]
            done[id(recipe)] = recipe.make(maps)
            del maps
        return done[id(self)]

    def _in_order(self) -> list[Recipe]:
        """Return every recipe that this one is made of, and itself, inputs first."""
        order: dict[int, Recipe] = {}
        stack = [self]
        while stack:
            recipe = stack[-1]
            missing = [source for source in recipe.inputs if id(source) not in order]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            order.setdefault(id(recipe), recipe)
        return list(order.values())


@dataclass(frozen=True)
class Anchor:
    """The tensor that terms start from: its sizes at the traced example, and which of them are free."""

    node: fx.Node
    shape: tuple[int, ...]
    free: tuple[bool, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Anchor:
        """Return the anchor at ``node``."""
        return cls(node, node.meta["shape"], node.meta["free"])

    def dims(self, axis: int) -> int:
        """Number of spatial axes, given the channel axis: channels last have none."""
        return len(self.shape) - 2 if axis == 1 else 0

    def sizes(self, axis: int) -> tuple[int | None, ...]:
        """Spatial sizes, None where free."""
        spatial = range(2, 2 + self.dims(axis))
        return tuple(None if self.free[i] else self.shape[i] for i in spatial)

    def example_sizes(self, axis: int) -> tuple[int, ...]:
        """Spatial sizes at the traced example."""
        return self.shape[2 : 2 + self.dims(axis)]

    def positions(self, axis: int) -> int:
        """How often a map over the spatial axes is applied: once a sample, without any at each position."""
        return self.shape[0] if self.dims(axis) else prod(self.shape[:-1])


@dataclass(frozen=True, eq=False)
class Term:
    """``factor * x + offset`` before a channel axis is known (``axis`` None), else ``recipe`` applied plus ``offset``.

    ``offset`` is ``()``, ``(O,)``, or a field ``(O, *spatial)``, float64. ``convolutions`` counts the convolution
    and linear layers inside, ``kernels`` those and the pools. ``axis`` and the rest speak of the anchor's axes;
    ``layout`` says where the node has them, None where they are unmoved.
    """

    axis: int | None = None
    geometry: Geometry | None = None
    recipe: Recipe | None = None
    factor: float = 1.0
    offset: Tensor = torch.zeros((), dtype=torch.float64)  # noqa: RUF009 - never written to
    convolutions: int = 0
    kernels: int = 0
    layout: Layout | None = None

    def keeps_values(self) -> bool:
        """Whether it holds the anchor's values, each untouched."""
        return self.axis is None and self.factor == 1.0 and not bool(self.offset.any())


@dataclass(frozen=True, eq=False)
class Leaf:
    """One operator as a map: geometry now, weight when asked; ``pad_value`` is what its padding reads.

    ``has_kernel`` is false for a pad or a crop, ``is_layer`` true for what has weights of its own.
    """

    geometry: Geometry
    make: Callable[[], ConvMap]
    bias: Tensor | None = None
    pad_value: float = 0.0
    has_kernel: bool = True
    is_layer: bool = True


def channel_axis(term: Term, axis: int, anchor: Anchor) -> int:
    """Return the anchor's axis that is the node's ``axis``, to be taken for the channels."""
    held = (axis,) if term.layout is None else term.layout[axis]
    if term.layout is None and axis not in (1, len(anchor.shape) - 1):
        raise InexactError("values side by side along another axis than the channels")
    if len(held) != 1 or held[0] not in (1, len(anchor.shape) - 1):
        raise InexactError("channels that are merged with, or moved among, other axes")
    return held[0]


def lift(term: Term, axis: int, anchor: Anchor) -> Term:
    """Return ``term`` with the anchor's ``axis`` for its channels: a factor becomes a depthwise 1x1."""
    if term.axis is not None:
        if term.axis != axis:
            raise InexactError(f"channels on axis {term.axis} beside channels on axis {axis}")
        return term
    channels, dims = anchor.shape[axis], anchor.dims(axis)
    factor = term.factor
    recipe = Recipe(lambda _: scale_map(torch.full((channels,), factor, dtype=torch.float64), dims=dims))
    geometry = Geometry(channels, channels, channels, (Axis(),) * dims)
    return replace(term, axis=axis, geometry=geometry, recipe=recipe, factor=1.0, offset=term.offset.expand(channels))


def _known(term: Term) -> tuple[int, Geometry, Recipe]:
    assert term.axis is not None
    assert term.geometry is not None
    assert term.recipe is not None
    return term.axis, term.geometry, term.recipe


def _is_field(term: Term) -> bool:
    return term.offset.ndim > 1


def _middle_sizes(term: Term, anchor: Anchor) -> tuple[int | None, ...]:
    axis, geometry, _ = _known(term)
    if geometry.transposed:
        return (None,) * len(geometry.axes)
    return tuple(
        None if size is None else a.output_size(size) for a, size in zip(geometry.axes, anchor.sizes(axis), strict=True)
    )


def _fitted(leaf: Leaf, term: Term, axis: int, anchor: Anchor) -> Leaf:
    """Return ``leaf`` over the anchor's spatial axes; where the positions were rearranged only a 1x1 can be."""
    if term.layout is None:
        return leaf
    if not leaf.geometry.is_pointwise():
        raise InexactError("a kernel over positions that were rearranged")
    dims = anchor.dims(axis)
    geometry = replace(leaf.geometry, axes=(Axis(),) * dims)

    def make() -> ConvMap:
        kernel = leaf.make()
        return ConvMap(kernel.weight.reshape(geometry.weight_shape), kernel.bias, geometry)

    return replace(leaf, geometry=geometry, make=make)


def apply_leaf(leaf: Leaf, term: Term, axis: int, anchor: Anchor) -> Term:
    """Return ``leaf(term)``, whose channels lie on the node's ``axis``.

    The border rule judges the linear part; the constant must be what the padding reads.
    """
    axis = channel_axis(term, axis, anchor)
    leaf = _fitted(leaf, term, axis, anchor)
    inner = lift(term, axis, anchor)
    _, geometry, recipe = _known(inner)
    sizes = anchor.sizes(axis)
    combined = compose_geometry(leaf.geometry, geometry, sizes)
    offset = _offset_through(leaf, inner, anchor)
    make = leaf.make
    return Term(
        axis,
        combined,
        Recipe(lambda maps: compose(make(), maps[0], sizes), (recipe,)),
        offset=offset,
        convolutions=inner.convolutions + leaf.is_layer,
        kernels=inner.kernels + leaf.has_kernel,
        layout=term.layout,
    )


def _offset_through(leaf: Leaf, inner: Term, anchor: Anchor) -> Tensor:
    """Return the constant behind ``leaf``: through its kernel, and over its padding."""
    own = leaf.bias if leaf.bias is not None else torch.zeros((), dtype=torch.float64)
    if leaf.geometry.transposed and bool(inner.offset.any()):
        raise InexactError("a biased map before a transposed convolution, which sums fewer values at the border")
    zeros_read = (
        not leaf.geometry.transposed
        and leaf.geometry.padding_mode == "zeros"
        and leaf.geometry.reads_outside(_middle_sizes(inner, anchor))
    )
    agrees = not _is_field(inner) and bool((inner.offset == leaf.pad_value).all())
    if not leaf.has_kernel:
        # A pad or a crop moves the constant unchanged; padding with another value leaves a field.
        if not _is_field(inner) and (agrees or not zeros_read):
            return inner.offset
        return _padded_field(leaf, inner, anchor)
    if _is_field(inner):
        raise InexactError("a constant that differs at the border reaches a convolution")
    if zeros_read and not agrees:
        raise InexactError("a biased map before zero padding: the padding is zero, the map evaluated there is not")
    if not bool(inner.offset.any()):
        return own.expand(leaf.geometry.out_channels)
    return through(leaf.make(), inner.offset) + own


def _padded_field(leaf: Leaf, inner: Term, anchor: Anchor) -> Tensor:
    axis, geometry, _ = _known(inner)
    sizes = geometry.output_sizes(anchor.example_sizes(axis))
    field = inner.offset if _is_field(inner) else inner.offset.reshape(-1, *(1,) * len(sizes)).expand(-1, *sizes)
    if leaf.geometry.padding_mode != "zeros":
        raise InexactError(f"{leaf.geometry.padding_mode} padding of a constant that differs at the border")
    widths = [side for a in reversed(leaf.geometry.axes) for side in (a.low, a.high)]
    padded = torch.nn.functional.pad(field, widths, value=leaf.pad_value)
    return padded[(slice(None), *(slice(None, None, a.stride) for a in leaf.geometry.axes))]


def scale_term(term: Term, scale: Tensor | float, shift: Tensor | float, axis: int | None, anchor: Anchor) -> Term:
    """Return ``scale * term + shift``: one number each (``axis`` None), or ``(C,)`` along the node's ``axis``."""
    if axis is None and term.axis is None:
        return replace(term, factor=term.factor * float(scale), offset=term.offset * scale + shift)
    lifted = lift(term, channel_axis(term, axis, anchor), anchor) if axis is not None else term
    _, geometry, recipe = _known(lifted)
    channels = geometry.out_channels
    per_channel = torch.as_tensor(scale, dtype=torch.float64).expand(channels)
    added = torch.as_tensor(shift, dtype=torch.float64).expand(channels)
    column = (-1, *(1,) * (lifted.offset.ndim - 1))
    offset = lifted.offset * per_channel.reshape(column) + added.reshape(column)
    return replace(lifted, recipe=Recipe(lambda maps: fold(maps[0], per_channel), (recipe,)), offset=offset)


def add_terms(left: Term, right: Term, anchor: Anchor) -> Term:
    """Return ``left + right``."""
    _check_layouts((left, right))
    if left.axis is None and right.axis is None:
        return replace(
            left,
            factor=left.factor + right.factor,
            offset=left.offset + right.offset,
            convolutions=left.convolutions + right.convolutions,
            kernels=left.kernels + right.kernels,
        )
    axis = left.axis if left.axis is not None else right.axis
    assert axis is not None
    a, b = lift(left, axis, anchor), lift(right, axis, anchor)
    sizes = anchor.sizes(axis)
    geometry = merge_geometry(_known(a)[1], _known(b)[1], sizes)
    recipe = Recipe(lambda maps: merge(maps[0], maps[1], sizes), (_known(a)[2], _known(b)[2]))
    offset = _aligned(a.offset, b.offset.ndim) + _aligned(b.offset, a.offset.ndim)
    convolutions, kernels = a.convolutions + b.convolutions, a.kernels + b.kernels
    return Term(axis, geometry, recipe, 1.0, _settled(offset), convolutions, kernels, left.layout)


def _check_layouts(terms: tuple[Term, ...]) -> None:
    if any(term.layout != terms[0].layout for term in terms):
        raise InexactError("branches whose positions are arranged differently")


def _aligned(offset: Tensor, ndim: int) -> Tensor:
    return offset.reshape(-1, *(1,) * (ndim - 1)) if offset.ndim == 1 and ndim > 1 else offset


def _settled(offset: Tensor) -> Tensor:
    """Return a field that is uniform, up to rounding, as one constant per channel."""
    if offset.ndim <= 1:
        return offset
    flat = offset.flatten(1)
    spread = (flat - flat[:, :1]).abs().amax(1)
    is_uniform = bool((spread <= _FIELD_TOLERANCE * flat.abs().amax(1)).all())
    return flat[:, flat.shape[1] // 2] if is_uniform else offset


def concatenate_terms(terms: tuple[Term, ...], axis: int, anchor: Anchor) -> Term:
    """Return the outputs of ``terms`` side by side along the channels, the node's ``axis``."""
    _check_layouts(terms)
    axis = channel_axis(terms[0], axis, anchor)
    lifted = [lift(term, axis, anchor) for term in terms]
    sizes = anchor.sizes(axis)
    geometry = concatenate_geometry(tuple(_known(term)[1] for term in lifted), sizes)
    recipe = Recipe(lambda maps: concatenate(tuple(maps), sizes), tuple(_known(term)[2] for term in lifted))
    if any(_is_field(term) for term in lifted):
        raise InexactError("a constant that differs at the border inside a concatenation")
    offset = torch.cat([term.offset for term in lifted])
    convolutions, kernels = (sum(getattr(term, name) for term in lifted) for name in ("convolutions", "kernels"))
    return Term(axis, geometry, recipe, 1.0, offset, convolutions, kernels, terms[0].layout)


def select_term(term: Term, start: int, stop: int, axis: int, anchor: Anchor) -> Term:
    """Return output channels ``[start, stop)`` of the node's ``axis``."""
    lifted = lift(term, channel_axis(term, axis, anchor), anchor)
    _, geometry, recipe = _known(lifted)
    selected = select_geometry(geometry, start, stop)
    return replace(
        lifted,
        geometry=selected,
        recipe=Recipe(lambda maps: select(maps[0], start, stop), (recipe,)),
        offset=lifted.offset[start:stop],
    )


def overwrite_term(term: Term, value: Tensor, dim: int, window: slice, anchor: Anchor) -> Term:
    """Return ``term`` with a border strip set to a constant ``(O, ...)``; exact where only padding lies under it."""
    if term.layout is not None:
        raise InexactError("a strip is written over positions that were rearranged")
    lifted = lift(term, 1, anchor)
    _, geometry, _ = _known(lifted)
    axis = geometry.axes[dim - 2]
    size = anchor.shape[dim]
    is_free = anchor.free[dim]
    count = axis.output_size(size)
    first, last = window.start, window.stop
    from_low = last <= count // 2
    if geometry.padding_mode != "zeros" or (is_free and axis.stride != 1):
        raise InexactError("a strip is written over an output whose border is not plain zero padding")
    touches = any(axis.stride * j + axis.last >= 0 and axis.stride * j + axis.first < size for j in range(first, last))
    if touches:
        raise InexactError(
            f"{'the first' if from_low else 'the last'} {last - first} rows written over hold real output"
        )
    sizes = geometry.output_sizes(anchor.example_sizes(1))
    column = lifted.offset if _is_field(lifted) else lifted.offset.reshape(-1, *(1,) * len(sizes)).expand(-1, *sizes)
    field = column.clone()
    field.narrow(dim - 1, first, last - first).copy_(value.expand(field.narrow(dim - 1, first, last - first).shape))
    return replace(lifted, offset=_settled(field))


def permute_term(term: Term, order: tuple[int, ...], anchor: Anchor) -> Term:
    """Return ``term`` with the node's axes in another order."""
    layout = term.layout or unmoved(len(anchor.shape))
    return _arranged(term, tuple(layout[axis] for axis in order), anchor)


def reshape_term(term: Term, shape: tuple[Size, ...], anchor: Anchor) -> Term:
    """Return ``term`` with the node's axes merged, or merged axes apart again."""
    sizes = list(zip(anchor.shape, anchor.free, strict=True))
    if term.axis is not None:
        _, geometry, _ = _known(term)
        sizes[term.axis] = (geometry.out_channels, False)
        outputs = geometry.output_sizes(anchor.example_sizes(term.axis))
        sizes[2 : 2 + len(outputs)] = zip(outputs, anchor.free[2 : 2 + len(outputs)], strict=True)
    layout = term.layout or unmoved(len(anchor.shape))
    return _arranged(term, reshaped(layout, tuple(sizes), shape), anchor)


def _arranged(term: Term, layout: Layout, anchor: Anchor) -> Term:
    return replace(term, layout=None if layout == unmoved(len(anchor.shape)) else layout)


def moves_after(term: Term, anchor: Anchor) -> int:
    """Return how many operators bring the anchor's axes to where the node has them."""
    return 0 if term.layout is None else len(moves(term.layout, len(anchor.shape)))


def is_written_as_linear(term: Term, anchor: Anchor) -> bool:
    """Whether ``term`` becomes a linear layer: no spatial axes, or a 1x1 that runs after its positions are moved."""
    geometry = takeable_geometry(term, anchor)
    is_map = bool(term.convolutions) and not geometry.transposed
    return is_map and (not geometry.axes or (moves_first(term) and geometry.is_pointwise() and geometry.groups == 1))


def moves_first(term: Term) -> bool:
    """Whether channels come last at the node: a linear layer then runs on the moved tokens as they are."""
    return term.layout is not None and term.layout[-1] == (term.axis,)


def takeable_geometry(term: Term, anchor: Anchor) -> Geometry:
    """Return the geometry of the one operator that would compute ``term`` from its whole anchor."""
    axis, geometry, _ = _known(term)
    channels = anchor.shape[axis]
    if (geometry.reads, geometry.in_channels) != (0, channels):
        geometry = replace(geometry, reads=0, in_channels=channels, groups=1)
    if not geometry.axes and not geometry.is_diagonal():
        geometry = regroup_geometry(geometry, 1)
    return geometry
