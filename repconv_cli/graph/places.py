"""Where a block is proved: the shapes of its input, and the constants there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from repconv_cli.algebra import Axis
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.plan import Block
from repconv_cli.graph.rules import RULES, aten, convolutions, elementwise

_MOST_GEOMETRIES = 8
_MOST_OTHERS = 2
Place = tuple[tuple[int, ...], Constants]


def small_places(block: Block, region: list[fx.Node], operator: fx.Graph, constants: Constants) -> list[Place]:
    """Return the input shapes to prove the block at, one sample each, and the constants there.

    Where a size is free, nothing depends on it but which window is the last one, so small sizes do, larger than the
    kernel and one for each remainder by the stride. A fixed size is taken as it is, unless nothing in the region and in
    what replaces it knows a place but by its distance from the borders: then a small one with its remainder does. A
    region that reads sizes runs where those are known: as traced, and with the model's own free sizes grown.
    """
    anchor, term = block.anchor, block.choice.candidate.term
    shape, free = anchor.meta["shape"], anchor.meta["free"]
    if _reads_sizes(region, anchor):
        return traced_and_others(anchor, constants)
    axes = term.geometry.axes if term.geometry is not None else ()
    calls = [*region, *(node for node in operator.nodes if node.op == "call_function")]
    places = _places(axes, term.axis, len(shape)) if all(_is_local(node) for node in calls) else {}
    stride = max((axis.stride for axis in axes), default=1)
    # A window at one border then sees no other border, and another one lies inside what is not cropped.
    smallest = max((axis.extent - min(axis.low, 0) - min(axis.high, 0) for axis in axes), default=1) + stride

    def sizes(grown: int) -> Iterator[int]:
        for index, size in enumerate(shape[1:], start=1):
            if free[index]:
                # Each axis of another size than the next.
                yield smallest + grown + index - 2
            elif index in places:
                yield min(size, smallest + (size - smallest) % places[index].stride)
            else:
                yield size

    count = min(stride, _MOST_GEOMETRIES) if any(free[1:]) else 1
    return [((1 if free[0] else shape[0], *sizes(grown)), constants) for grown in range(count)]


def traced_and_others(anchor: fx.Node, constants: Constants) -> list[Place]:
    """Return the traced shape and those that the anchor has where the free sizes are others.

    None, if no other is known of an anchor whose size is free.
    """
    places = [(constants.shape(anchor), constants)]
    seen = {places[0][0][1:]}
    for other in constants.elsewhere:
        shape = other.shape(anchor)
        if shape[1:] not in seen and len(places) <= _MOST_OTHERS:
            seen.add(shape[1:])
            places.append((shape, other))
    is_free = any(anchor.meta["free"][1:])
    return [] if is_free and len(places) == 1 else places


def _reads_sizes(region: list[fx.Node], anchor: fx.Node) -> bool:
    """Whether a size, or a constant made for one, is read: the region then runs at the traced sizes alone."""
    seen = {anchor, *region}
    stack = [source for node in region for source in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node.meta.get("is_size"):
            return True
        if node not in seen and node.op == "call_function":
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False


def _places(axes: tuple[Axis, ...], channels: int | None, ndim: int) -> dict[int, Axis]:
    """Return the axes of the anchor, but samples and channels, each with how the block reads along it."""
    places = [index for index in range(1, ndim) if index != channels]
    return dict(zip(places, axes or [Axis()] * len(places), strict=True)) if len(axes) in (0, len(places)) else {}


def _is_local(node: fx.Node) -> bool:
    """Whether an operator treats all places alike, but for their distance from the borders."""
    return node.target in _LOCAL or (node.target is aten.cat.default and node.args[1:] == (1,))


# What their rules describe by a kernel, a number or a value for each channel.
_LOCAL = {
    target for target, rule in RULES.items() if rule.__module__ in (convolutions.__name__, elementwise.__name__)
} | {aten.pad.default, aten.constant_pad_nd.default, aten.permute.default, aten.transpose.int, aten.t.default}
