"""What torch says: layers as torch runs them, and the naive convolutions that a careless fuse would build.

Nothing here imports the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

RELATIVE = 1e-11
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}

Call = Callable[[Tensor], Tensor]
Pads = tuple[tuple[int, int], ...]


def pad(x: Tensor, pads: Pads, mode: str = "zeros") -> Tensor:
    """Pad first and crop after, so that a crop never changes what the padding sees."""
    widths = [width for pair in reversed(pads) for width in pair]
    if any(width > 0 for width in widths):
        x = functional.pad(x, [max(width, 0) for width in widths], "constant" if mode == "zeros" else mode)
    if any(width < 0 for width in widths):
        x = functional.pad(x, [min(width, 0) for width in widths])
    return x


@dataclass(frozen=True)
class TorchLayer:
    """A layer as torch runs it: ``forward`` is the whole of it, ``core`` the same without its padding.

    ``window`` is how many input positions one output of ``core`` reads on each axis.
    """

    forward: Call
    core: Call
    in_channels: int
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    pads: Pads = ()
    mode: str = "zeros"
    is_transposed: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def impulse_response(core: Call, channels: int, window: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (kernel, bias) of an affine ``core`` that turns one window of input into one output."""
    count = channels * prod(window)
    impulses = torch.eye(count, dtype=torch.float64).reshape(count, channels, *window)
    bias = core(torch.zeros(1, channels, *window, dtype=torch.float64))
    assert bias.shape[2:] == (1,) * len(window), "the window must give exactly one output position"
    columns = (core(impulses) - bias).flatten(1)
    return columns.T.reshape(-1, channels, *window), bias.flatten()


def composed_shape(outer: TorchLayer, inner: TorchLayer) -> tuple[tuple[int, ...], tuple[int, ...], Pads]:
    """Return (window, stride, padding) that the composition has away from any border."""
    axes = list(zip(inner.window, inner.stride, inner.pads, outer.window, outer.stride, outer.pads, strict=True))
    window = tuple(wi + si * (wo - 1) for wi, si, _, wo, _, _ in axes)
    stride = tuple(si * so for _, si, _, _, so, _ in axes)
    pads = tuple((pi[0] + si * po[0], pi[1] + si * po[1]) for _, si, pi, _, _, po in axes)
    return window, stride, pads


@lru_cache(maxsize=32)
def naive_composition(outer: TorchLayer, inner: TorchLayer) -> Callable[[Tensor, str], Tensor]:
    """Return the convolution a careless fuse would build of ``outer`` after ``inner``: right inside, blind at borders.

    Its kernel is the impulse response of the two unpadded layers; it is called with the input and a padding mode.
    """
    window, stride, pads = composed_shape(outer, inner)
    kernel, bias = impulse_response(lambda x: outer.core(inner.core(x)), inner.in_channels, window)
    convolve = CONVOLUTIONS[len(window)]
    return lambda x, mode: convolve(pad(x, pads, mode), kernel, bias, stride)


def naive_sum(left: TorchLayer, right: TorchLayer) -> Callable[[Tensor, str], Tensor]:
    """Return the sum of two layers that both read one padded input: what a merge that ignores the modes computes."""
    return lambda x, mode: left.core(pad(x, left.pads, mode)) + right.core(pad(x, right.pads, mode))


def differs_in_every_mode(naive: Callable[[Tensor, str], Tensor], x: Tensor, truth: Tensor) -> bool:
    """Whether no padding mode makes the naive convolution right on ``x``; modes torch cannot run do not count."""
    outcomes = []
    for mode in PADDING_MODES:
        try:
            outcomes.append(naive(x, mode))
        except RuntimeError:
            continue
    assert outcomes, "no padding mode could be run, so nothing was shown"
    return not any(is_equal(outcome, truth) for outcome in outcomes)


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of a channel, relative to the largest value that torch gives there; NaN stays NaN."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    error = (found - expected).abs().transpose(0, 1).flatten(1).amax(1)
    size = expected.abs().transpose(0, 1).flatten(1).amax(1)
    # A channel that is zero through cancellation has no size of its own.
    floor = 1e-3 * float(size.max()) or 1.0
    return float((error / size.clamp_min(floor)).max())


def is_equal(found: Tensor, expected: Tensor) -> bool:
    """Whether ``found`` is torch's answer, per channel to a relative ``1e-11``."""
    return error_of(found, expected) <= RELATIVE


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Fail with the sizes and the error unless ``found`` is torch's answer."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, torch gives {tuple(expected.shape)}"
    assert found.dtype == expected.dtype == torch.float64, f"dtype {found.dtype}, needed float64"
    error = error_of(found, expected)
    assert error <= RELATIVE, f"off by {error:.3g} of the channel's range"
