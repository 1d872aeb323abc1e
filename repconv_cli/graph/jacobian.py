"""The Jacobian of an affine map, by rows: where its outputs read, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from repconv_cli.algebra import Axis
from repconv_cli.errors import InexactError

# A kernel larger than this is not worth the rows of a Jacobian.
MAX_KERNEL = 2**22
TOLERANCE = 1e-12


class Jacobian:
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
        found = self._mixed({0: place})
        if bool(found[1:].any()):
            raise InexactError("a sample that depends on another")
        return found[0]

    def _mixed(self, places: dict[int, tuple[int, ...]]) -> Tensor:
        """Return the mixtures of rows of some samples, each at its own place, in one gradient."""
        cotangent = torch.zeros_like(self.y)
        for sample, place in places.items():
            index: tuple[Any, ...] = (sample, slice(None), *place)
            cotangent[index] = self.mixture
        return self.gradient(cotangent)

    def _two_rows(self, place: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the mixed rows at the middle and at ``place``, of two samples if there are: one gradient, not two.

        Whether samples are apart shows in :meth:`mixed_row`.
        """
        if self.y.shape[0] == 1:
            return self.mixed_row(self.middle), self.mixed_row(place)
        first, second, *_ = self._mixed({0: self.middle, 1: place})
        return first, second

    def bias(self) -> Tensor:
        """Return the constant that is added to each channel."""
        flat = self.y.detach().transpose(0, 1).flatten(1)
        if bool((flat != flat[:, :1]).any()):
            raise InexactError("a constant that differs from place to place")
        return flat[:, 0].clone()

    def axes(self, free: tuple[bool, ...]) -> tuple[Axis, ...]:
        """Return where the outputs read, along each axis; the same mixture of rows must be found at several places."""
        # Along each axis the next place, or the one before where there is no next.
        steps = tuple(1 if at + 1 < count else -min(at, 1) for at, count in zip(self.middle, self.counts, strict=True))
        middle, beside = self._two_rows(tuple(at + step for at, step in zip(self.middle, steps, strict=True)))
        spans, moved = _span(middle.abs().sum(0)), _span(beside.abs().sum(0))
        axes = []
        for index, (start, stop, step) in enumerate(spans):
            size, count = self.sizes[index], self.counts[index]
            stride = size if count == 1 else (moved[index][0] - start) * steps[index]
            if stride < 1:
                raise InexactError("outputs that read the same place")
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
            if bool(((self.mixed_row(place) - expected).abs() > TOLERANCE * window.abs().max()).any()):
                raise InexactError("rows that are not the same everywhere")
        return found

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
