"""How kernels are computed once they are wanted: recipes made of recipes, and sums of them in one accumulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repconv_cli.algebra import ConvMap, Geometry
from repconv_cli.algebra.operations import add_onto, reading, reads_alike, scaled, write_scaled
from repconv_cli.algebra.slabs import LazyWeight, is_large

Stored = tuple[Callable[[], Tensor], Geometry]


@dataclass(frozen=True, eq=False)
class Recipe:
    """How to compute a kernel from other kernels; constants (biases) are kept elsewhere.

    ``stored`` gives the kernel in whatever type it is stored, and its geometry, where nothing is to be computed.
    """

    make: Callable[[list[ConvMap]], ConvMap]
    inputs: tuple[Recipe | Sum, ...] = ()
    stored: Stored | None = None


@dataclass(frozen=True, eq=False)
class Sum:
    """Kernels added up on the taps of ``geometry``, each scaled by one factor per output channel (None: by 1)."""

    geometry: Geometry
    parts: tuple[tuple[Tensor | None, Recipe | Sum], ...]

    @property
    def inputs(self) -> tuple[Recipe | Sum, ...]:
        """The kernels that are added."""
        return tuple(part for _, part in self.parts)


Scaled = tuple[Tensor | None, Recipe | Sum]
"""A kernel and its factors, one per output channel (None: 1)."""


def compute(kernel: Recipe | Sum) -> ConvMap:
    """Return the kernel as a map without bias.

    Every shared recipe is computed once, without recursion, and kept no longer than another one needs it. Sums of sums
    are one sum; its parts are computed one after the other, and added to the same tensor.
    """
    root = _chained(kernel)
    order = _in_order(root)
    waiting = _readers(order)
    done: dict[int, ConvMap] = {}
    for recipe in order:
        assert isinstance(recipe, Recipe)
        maps = [done[id(source)] for source in recipe.inputs]
        for source in recipe.inputs:
            waiting[id(source)] -= 1
            if not waiting[id(source)]:
                del done[id(source)]
        done[id(recipe)] = recipe.make(maps)
        del maps
    return done[id(root)]


def compute_lazily(kernel: Sum) -> tuple[LazyWeight, Tensor] | None:
    """Return the weight of a large kernel, computed where it is read, and its bias; None where it has to be made whole.

    It can be a stored kernel and what is added to it, unless that has to be computed from others. The bits are those
    that :func:`compute` gives: no output channel depends on another.
    """
    geometry = kernel.geometry
    if geometry.groups > 1 or not is_large(torch.Size(geometry.weight_shape)):
        return None
    whole, others = _with_whole_first(geometry, _parts(kernel, _absorbed(_in_order(kernel))))
    if whole is None or any(part.inputs for _, part in others):
        return None
    bias = torch.zeros(geometry.out_channels, dtype=torch.float64)
    added: list[tuple[Tensor | None, Tensor, Geometry]] = []
    for scale, part in others:
        assert isinstance(part, Recipe)
        if part.stored is not None and reads_alike(part.stored[1], geometry):
            stored, own = part.stored
            added.append((scale, stored(), own))
            continue
        made = reading(part.make([]), geometry)
        added.append((scale, made.weight, made.geometry))
        bias = bias + (made.bias if scale is None else made.bias * scale)
    first, factors = _stored(whole)

    def write(place: slice, out: Tensor) -> None:
        write_scaled(out, first[place], _of(factors, place))
        for scale, weight, own in added:
            add_onto(out, geometry, weight[place], own, _of(scale, place))

    return LazyWeight(geometry.weight_shape, write), bias


def _in_order(root: Recipe | Sum) -> list[Recipe | Sum]:
    """Return every recipe that this one is made of, and itself, inputs first."""
    order: dict[int, Recipe | Sum] = {}
    stack = [root]
    while stack:
        recipe = stack[-1]
        missing = [source for source in recipe.inputs if id(source) not in order]
        if missing:
            # The first input first, so that a sum takes up its parts as they come.
            stack.append(missing[0])
            continue
        stack.pop()
        order.setdefault(id(recipe), recipe)
    return list(order.values())


def _readers(order: list[Recipe | Sum]) -> Counter[int]:
    return Counter(id(source) for recipe in order for source in recipe.inputs)


def _chained(root: Recipe | Sum) -> Recipe:
    """Return ``root`` with each sum as a chain of additions to one tensor.

    A sum that another sum alone reads is part of that one.
    """
    order = _in_order(root)
    absorbed = _absorbed(order)
    chained: dict[int, Recipe] = {}
    for recipe in order:
        if isinstance(recipe, Recipe):
            inputs = tuple(chained[id(source)] for source in recipe.inputs)
            chained[id(recipe)] = Recipe(recipe.make, inputs, recipe.stored)
        elif id(recipe) not in absorbed:
            chained[id(recipe)] = _chain(
                recipe.geometry, [(scale, chained[id(part)]) for scale, part in _parts(recipe, absorbed)]
            )
    return chained[id(root)]


def _absorbed(order: list[Recipe | Sum]) -> set[int]:
    """Return which sums are read by another sum alone."""
    readers = _readers(order)
    return {
        id(part)
        for recipe in order
        if isinstance(recipe, Sum)
        for part in recipe.inputs
        if isinstance(part, Sum) and readers[id(part)] == 1
    }


def _parts(total: Sum, absorbed: set[int]) -> list[Scaled]:
    """Return the parts of ``total`` and of the sums inside it, in order, with the product of their factors."""
    found: list[Scaled] = []
    stack: list[Scaled] = [*reversed(total.parts)]
    while stack:
        scale, part = stack.pop()
        if isinstance(part, Sum) and id(part) in absorbed:
            stack.extend((_product(scale, inner), source) for inner, source in reversed(part.parts))
        else:
            found.append((scale, part))
    return found


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return left if right is None else right if left is None else left * right


def _with_whole_first(geometry: Geometry, parts: list[Scaled]) -> tuple[Scaled | None, list[Scaled]]:
    """Return the first stored kernel that is on all the taps, which the others can be added to, and those."""
    for index, entry in enumerate(parts):
        part = entry[1]
        if isinstance(part, Recipe) and part.stored is not None and part.stored[1] == geometry:
            return entry, parts[:index] + parts[index + 1 :]
    return None, parts


def _chain(geometry: Geometry, parts: list[Scaled]) -> Recipe:
    """Return the recipe whose tensor each of ``parts`` is added to in turn: no other recipe reads it before."""
    whole, others = _with_whole_first(geometry, parts)

    def start(_: list[ConvMap]) -> ConvMap:
        weight = torch.zeros(geometry.weight_shape, dtype=torch.float64) if whole is None else scaled(*_stored(whole))
        return ConvMap(weight, torch.zeros(geometry.out_channels, dtype=torch.float64), geometry)

    total = Recipe(start)
    for scale, part in others:
        assert isinstance(part, Recipe)
        total = _added(total, scale, part, geometry)
    return total


def _stored(whole: Scaled) -> tuple[Tensor, Tensor | None]:
    scale, part = whole
    assert isinstance(part, Recipe)
    assert part.stored is not None
    stored, _ = part.stored
    return stored(), scale


def _of(scale: Tensor | None, place: slice) -> Tensor | None:
    return None if scale is None else scale[place]


def _added(total: Recipe, scale: Tensor | None, part: Recipe, geometry: Geometry) -> Recipe:
    if part.stored is not None:
        stored, own = part.stored

        def add_stored(maps: list[ConvMap]) -> ConvMap:
            add_onto(maps[0].weight, geometry, stored(), own, scale)
            return maps[0]

        return Recipe(add_stored, (total,))

    def add(maps: list[ConvMap]) -> ConvMap:
        sofar, more = maps
        add_onto(sofar.weight, geometry, more.weight, more.geometry, scale)
        bias = more.bias if scale is None else more.bias * scale
        return ConvMap(sofar.weight, sofar.bias + bias, geometry)

    return Recipe(add, (total, part))
