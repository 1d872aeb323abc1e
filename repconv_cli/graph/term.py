"""``Term``: what a node computes from its anchor, a linear part (a convolution) plus a constant field.

The geometry and the constant are known at once; the kernel is a recipe, computed only for what is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry, Kernel
from repconv_cli.graph.arrange import Layout
from repconv_cli.graph.recipe import Recipe, Sum


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
    and linear layers inside, ``kernels`` those and the pools; ``transposes`` tells if one of them is a transposed
    convolution. ``axis`` and the rest speak of the anchor's axes; ``layout`` says where the node has them, None where
    they are unmoved.
    """

    axis: int | None = None
    geometry: Geometry | None = None
    recipe: Recipe | Sum | None = None
    factor: float = 1.0
    offset: Tensor = torch.zeros((), dtype=torch.float64)  # noqa: RUF009 - never written to
    convolutions: int = 0
    kernels: int = 0
    layout: Layout | None = None
    transposes: bool = False

    def keeps_values(self) -> bool:
        """Whether it holds the anchor's values, each untouched."""
        return self.axis is None and self.factor == 1.0 and not bool(self.offset.any())


@dataclass(frozen=True, eq=False)
class Leaf:
    """One operator as a map: geometry now, weight when asked; ``pad_value`` is what its padding reads.

    ``stored`` gives that weight in whatever type it is stored, where it is stored as the map has it.
    ``has_kernel`` is false for a pad or a crop, ``is_layer`` true for what has weights of its own, ``transposes`` for
    a transposed convolution of any stride.
    """

    geometry: Geometry
    make: Callable[[], ConvMap]
    bias: Tensor | None = None
    pad_value: float = 0.0
    has_kernel: bool = True
    is_layer: bool = True
    transposes: bool = False
    stored: Callable[[], Tensor] | None = None

    def kernel(self) -> ConvMap | Kernel:
        """Return the weight, as it is stored where it is."""
        return self.make() if self.stored is None else Kernel(self.stored(), self.geometry)
