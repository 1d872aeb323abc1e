"""A net while it is drawn: every layer runs at once, so that only what torch takes is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tests.graph.nets.language import Layer, Machine

T = TypeVar("T")
LARGEST = 1e9


class Chance(Protocol):
    """Where choices come from: ``random.Random`` in the benchmark, hypothesis in the tests."""

    def choice(self, options: Sequence[T]) -> T:
        """Return one of ``options``."""
        ...


class Builder:
    """A net while it is drawn: each layer is run at once, and left out where torch refuses it."""

    def __init__(self, chance: Chance, shape: tuple[int, ...], seed: int) -> None:
        self.chance, self.shape, self.machine = chance, shape, Machine(seed)
        self.layers: list[Layer] = []
        self.values: list[Tensor] = [torch.ones(shape)]

    def size(self, value: int) -> tuple[int, ...]:
        return tuple(self.values[value].shape)

    def is_likely(self, out_of: int) -> bool:
        """Return False once in ``out_of``."""
        return self.chance.choice([True] * (out_of - 1) + [False])

    def is_rare(self, out_of: int) -> bool:
        return not self.is_likely(out_of)

    def add(self, kind: str, *reads: int, like: int | None = None, **options: Any) -> int | None:
        """Return the index of the value of a new layer, or None where torch does not take it."""
        layer = Layer(kind, reads, options, like)
        try:
            with torch.no_grad():
                value = self.machine.layer(len(self.layers), layer, self.values)
        except (RuntimeError, ValueError, IndexError):
            return None
        if not value.numel() or value.shape[0] != self.shape[0] or not float(value.abs().max()) < LARGEST:
            return None
        self.layers.append(layer)
        self.values.append(value)
        return len(self.values) - 1

    def tried(self, kind: str, read: int, **options: Any) -> int:
        """Return the value of a new layer, or ``read`` itself where torch does not take it."""
        found = self.add(kind, read, **options)
        return read if found is None else found
