"""Give a freshly built model parameters and norm statistics that hide nothing.

At initial values most mistakes of a fuse go unseen: a norm with mean 0, variance 1 and gamma 1 is nearly the identity,
and a layer scale of 1e-5 hides the whole branch behind it. So every parameter that is still constant is drawn, gamma
is negative in part, and the running statistics are those of real activations: with statistics drawn at random a deep
net drifts to denormals or to 1e8, and then neither tolerances nor timings mean anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A channel that is dead on the calibration data must not be blown up by 1 / sqrt(eps) on other data.
_SMALLEST_SHARE = 1e-2


def randomise(module: nn.Module, run: Callable[[nn.Module], Any], seed: int = 0) -> None:
    """Draw the constant parameters of ``module``, then set its norm statistics to those seen by ``run(module)``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in _norms(module):
            _draw_affine(norm, generator)
        _draw_constants(module, generator)
        with _statistics_from_data(module):
            run(module)


def _norms(module: nn.Module) -> list[nn.Module]:
    """Return the modules with running statistics: batch norms, their subclasses, and frozen ones of other classes."""
    return [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]


def _draw_affine(norm: nn.Module, generator: torch.Generator) -> None:
    gamma, beta = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(gamma, Tensor):
        magnitude = 0.5 + torch.rand(gamma.shape, generator=generator)
        is_negative = torch.rand(gamma.shape, generator=generator) < 0.2
        gamma.copy_(torch.where(is_negative, -magnitude, magnitude))
    if isinstance(beta, Tensor):
        beta.copy_(0.2 * torch.randn(beta.shape, generator=generator))


def _draw_constants(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        # Fixed numbers of the architecture (a bin scale, a kernel of ones) stay: the model's own code relies on them.
        if not parameter.requires_grad or not parameter.is_floating_point() or not parameter.numel():
            continue
        value = float(parameter.flatten()[0])
        if not bool((parameter == value).all()):
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if value == 0:
            # A matrix of noise adds up over its inputs; at 0.1 the offsets of a deformable attention jump about.
            parameter.copy_((0.1 if parameter.ndim == 1 else 0.02) * noise)
        elif abs(value) < 0.01:
            parameter.copy_(0.5 + 0.1 * noise)
        else:
            parameter.copy_(value * (1 + 0.2 * noise))


@contextmanager
def _statistics_from_data(module: nn.Module) -> Iterator[None]:
    """Let each norm take the statistics of what it is given, just before it uses them.

    Like training mode with cumulative averages, but frozen norms, which have no training mode, are calibrated too.
    """
    handles = [norm.register_forward_pre_hook(_set_statistics) for norm in _norms(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _set_statistics(norm: nn.Module, args: tuple[Any, ...]) -> None:
    x: Tensor = args[0]
    dims = [axis for axis in range(x.ndim) if axis != 1]
    variance = x.var(dims, unbiased=False)
    norm.running_mean.copy_(x.mean(dims))  # type: ignore[operator, union-attr]
    floor = (_SMALLEST_SHARE * variance.mean()).clamp_min(1e-6)
    norm.running_var.copy_(variance.maximum(floor))  # type: ignore[operator, union-attr]
