"""How a term is written: as which operator, with whose padding, and what moves its axes into place."""

from __future__ import annotations

from dataclasses import replace

from repconv_cli.algebra import Geometry
from repconv_cli.algebra.geometry import regroup_geometry
from repconv_cli.graph.arrange import Move, moves
from repconv_cli.graph.recipe import compute
from repconv_cli.graph.term import Anchor, Term


def can_be_padded(geometry: Geometry, sizes: tuple[int | None, ...]) -> bool:
    """Whether torch's pad operator can do it: in a mode other than zeros it crops nothing, and wraps around once."""
    if geometry.transposed or geometry.padding_mode == "zeros" or not geometry.reads_outside(sizes):
        return True
    most = {"reflect": -1, "circular": 0}.get(geometry.padding_mode)
    for axis, size in zip(geometry.axes, sizes, strict=True):
        is_too_wide = most is not None and size is not None and max(axis.low, axis.high) > size + most
        if min(axis.low, axis.high) < 0 or is_too_wide:
            return False
    return True


def pads_itself(term: Term, anchor: Anchor) -> bool:
    """Whether torch's convolution can do the term's padding, without a pad operator before it."""
    geometry = written_geometry(term, anchor)
    if geometry.transposed:
        return True
    assert term.axis is not None
    if geometry.padding_mode != "zeros" and geometry.reads_outside(anchor.sizes(term.axis)):
        return False
    return symmetric_padding(term, anchor) is not None or is_torch_same(term)


def symmetric_padding(term: Term, anchor: Anchor) -> tuple[int, ...] | None:
    """Return one padding number per axis that gives the same outputs, or None.

    With a stride, padding after the last window is never read, so ``high`` may be another number at a known size.
    """
    assert term.geometry is not None
    assert term.axis is not None
    pads = []
    for axis, size in zip(term.geometry.axes, anchor.sizes(term.axis), strict=True):
        is_same_size = size is not None and axis.output_size(size) == (
            (size + 2 * axis.low - axis.extent) // axis.stride + 1
        )
        if axis.low < 0 or (axis.low != axis.high and not is_same_size):
            return None
        pads.append(axis.low)
    return tuple(pads)


def is_torch_same(term: Term) -> bool:
    """Whether the padding is what torch's ``padding="same"`` gives: the larger half after."""
    assert term.geometry is not None
    return all(
        axis.stride == 1 and axis.low + axis.high == axis.extent - 1 and axis.low == (axis.extent - 1) // 2
        for axis in term.geometry.axes
    )


def moves_after(term: Term, anchor: Anchor) -> list[Move]:
    """Return the operators that bring the anchor's axes to where the node has them."""
    return [] if term.layout is None else moves(term.layout, len(anchor.shape))


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
    assert term.axis is not None
    assert term.geometry is not None
    geometry, channels = term.geometry, anchor.shape[term.axis]
    if (geometry.reads, geometry.in_channels) != (0, channels):
        geometry = replace(geometry, reads=0, in_channels=channels, groups=1)
    if not geometry.axes and not geometry.is_diagonal():
        geometry = regroup_geometry(geometry, 1)
    return geometry


def written_geometry(term: Term, anchor: Anchor) -> Geometry:
    """Return :func:`takeable_geometry` as it is written: as a transposed convolution where its author had one and it
    is less work, which it is by torch's count where the output is larger than the input."""
    plain = takeable_geometry(term, anchor)
    turned = plain.as_transposed() if term.transposes and plain.axes else None
    assert term.axis is not None
    sizes = anchor.example_sizes(term.axis)
    if turned is None or turned.multiply_accumulates(sizes) >= plain.multiply_accumulates(sizes):
        return plain
    return turned


def written_tensors(term: Term, anchor: Anchor) -> dict[str, tuple[int, ...]]:
    """Return the tensors that the operator reads, with their shapes as they are stored: none where it has no kernel.

    A scale and shift alone reads none that is neutral.
    """
    if term.axis is None:
        return {}
    geometry = written_geometry(term, anchor)
    if not term.convolutions and geometry.is_diagonal():
        return _scale_and_shift(term, anchor)
    _, _, *taps = shape = geometry.weight_shape
    if is_written_as_linear(term, anchor):
        shape = shape[:2]
    elif geometry.transposed:
        shape = (geometry.in_channels, geometry.out_channels // geometry.groups, *taps)
    return {"weight": shape, "bias": (geometry.out_channels,)}


def _scale_and_shift(term: Term, anchor: Anchor) -> dict[str, tuple[int, ...]]:
    assert term.axis is not None
    assert term.recipe is not None
    kernel = compute(term.recipe)
    is_read = {"weight": bool((kernel.weight != 1).any()), "bias": bool(term.offset.any() or kernel.bias.any())}
    column = (anchor.shape[term.axis], *(1,) * (len(anchor.shape) - 1 - term.axis))
    return {name: column for name, is_one_read in is_read.items() if is_one_read}
