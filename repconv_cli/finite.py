"""Whether a tensor holds numbers alone, and how large they are: in one pass, without another tensor of that size."""

from __future__ import annotations

import math

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: the extremes tell."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if values.element_size() == 1:
        # float8 has no order of its own.
        values = values.to(torch.float32)
    return not values.numel() or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def largest(tensor: torch.Tensor) -> float:
    """Return the largest magnitude of real values; NaN if there is one, 0 of none."""
    return max(abs(float(extreme)) for extreme in torch.aminmax(tensor)) if tensor.numel() else 0.0
