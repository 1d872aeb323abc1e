"""What operators make of terms: composed, scaled, added, side by side, selected, moved.

A step between may be no convolution (a padded constant, a border written over): the constant is then a field over
the output. When the field is uniform again, the term is a ``ConvMap``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from repconv_cli.algebra import ConvMap, Geometry, compose, concatenate, scale_map, select
from repconv_cli.algebra.border import compose_geometry
from repconv_cli.algebra.geometry import (
    Axis,
    concatenate_geometry,
    merge_geometry,
    select_geometry,
)
from repconv_cli.algebra.operations import Sizes, through
from repconv_cli.errors import InexactError
from repconv_cli.graph.arrange import Layout, Size, reshaped, unmoved
from repconv_cli.graph.recipe import Recipe, Sum
from repconv_cli.graph.term import Anchor, Leaf, Term

# Two ways to compute one constant (a norm's shift, a border's value) differ by float64 rounding and no more.
_FIELD_TOLERANCE = 1e-12


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


def _known(term: Term) -> tuple[int, Geometry, Recipe | Sum]:
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

    def stored() -> Tensor:
        return leaf.kernel().weight.reshape(geometry.weight_shape)

    return replace(leaf, geometry=geometry, make=make, stored=None if leaf.stored is None else stored)


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
    return Term(
        axis,
        combined,
        _composed(leaf, recipe, sizes, reads_anchor=term.keeps_values() and combined == leaf.geometry),
        offset=offset,
        convolutions=inner.convolutions + leaf.is_layer,
        kernels=inner.kernels + leaf.has_kernel,
        layout=term.layout,
        transposes=inner.transposes or leaf.transposes,
    )


def _composed(leaf: Leaf, inner: Recipe | Sum, sizes: Sizes, *, reads_anchor: bool) -> Recipe:
    if reads_anchor and leaf.stored is not None:
        return Recipe(lambda _: leaf.make(), stored=(leaf.stored, leaf.geometry))
    return Recipe(lambda maps: compose(leaf.kernel(), maps[0], sizes), (inner,))


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
    return through(leaf.kernel(), inner.offset) + own


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
    return replace(lifted, recipe=Sum(geometry, ((per_channel, recipe),)), offset=offset)


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
    recipe = Sum(geometry, ((None, _known(a)[2]), (None, _known(b)[2])))
    offset = _aligned(a.offset, b.offset.ndim) + _aligned(b.offset, a.offset.ndim)
    convolutions, kernels = a.convolutions + b.convolutions, a.kernels + b.kernels
    transposes = a.transposes or b.transposes
    return Term(axis, geometry, recipe, 1.0, _settled(offset), convolutions, kernels, left.layout, transposes)


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
    transposes = any(term.transposes for term in terms)
    return Term(axis, geometry, recipe, 1.0, offset, convolutions, kernels, terms[0].layout, transposes)


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
