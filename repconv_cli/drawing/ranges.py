"""The range of a weight, and what rounding to int8 would do to it."""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from repconv_cli.results import RangeFacts

_INT8_STEPS = 127


def range_of(name: str, weight: Tensor, output_axis: int = 0) -> RangeFacts:
    """Return the range of ``weight``.

    Symmetric int8 rounds to steps of ``max |w| / 127``; its error is uniform in a step, so its rms is that over
    ``sqrt(12)``. One large weight makes the step large for all others.

    >>> import torch
    >>> facts = range_of("w", torch.tensor([[1.0, -1.0], [0.01, 0.01]]))
    >>> facts.low, facts.high, facts.int8_error > facts.int8_error_by_channel
    (-1.0, 1.0, True)
    """
    values = weight.detach().double()
    rows = values.movedim(output_axis, 0).flatten(1)
    rms = float(values.square().mean().sqrt())
    largest = rows.abs().amax(1)

    def share(step: Tensor) -> float:
        return float(step.square().mean().sqrt()) / sqrt(12) / rms if rms else 0.0

    return RangeFacts(
        name=name,
        low=float(values.min()),
        high=float(values.max()),
        rms=rms,
        int8_error=share(largest.max() / _INT8_STEPS),
        int8_error_by_channel=share(largest / _INT8_STEPS),
    )
