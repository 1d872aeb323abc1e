"""Whether a tensor holds numbers alone."""

from __future__ import annotations

import math

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: the extremes tell, in one pass and without another tensor of that size."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if values.element_size() == 1:
        # float8 has no order of its own.
        values = values.to(torch.float32)
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))
