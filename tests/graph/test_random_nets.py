"""Random linear blocks between activations: fused or refused, they compute what the module computes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs
from tests.graph.models import NormAndPad, randomised
from tests.graph.proof import TOLERANCE, difference, noise

MODES = ("zeros", "reflect", "replicate", "circular")


class Sum(nn.Module):
    """Branches from one value, cropped to a common size and added with signs, or put side by side."""

    def __init__(
        self, branches: list[nn.Module], signs: list[int], is_side_by_side: bool, starts_at_zero: bool
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.signs, self.is_side_by_side, self.starts_at_zero = signs, is_side_by_side, starts_at_zero

    def forward(self, x: Tensor) -> Tensor:
        values = [branch(x) for branch in self.branches]
        height, width = (min(value.shape[axis] for value in values) for axis in (2, 3))
        values = [value[:, :, :height, :width] for value in values]
        if self.is_side_by_side:
            return torch.cat(values, 1)
        total: Any = 0 if self.starts_at_zero else values[0]
        for sign, value in zip(self.signs[not self.starts_at_zero :], values[not self.starts_at_zero :], strict=True):
            total = total + value if sign > 0 else total - value
        return total  # type: ignore[no-any-return]


class Scale(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.value = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        forms = {
            "scale": lambda: self.value * x,
            "shift": lambda: x + self.value,
            "divide": lambda: x / (self.value + 3.0),
            "negate": lambda: -x,
            "from": lambda: 0.7 - x,
            "half": lambda: x * 0.5,
            "affine": lambda: (x - 0.485) / 0.229,
        }
        return forms[self.kind]()


class Window(nn.Module):
    """A crop, a subsampling, or a pad of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        forms = {
            "crop": lambda: x[:, :, 1:-1, 1:],
            "every second": lambda: x[:, :, ::2, 1::2],
            "pad": lambda: functional.pad(x, (1, 0, 0, 1)),
            "pad with a value": lambda: functional.pad(x, (1, 1, 1, 1), value=0.5),
            "pad by reflection": lambda: functional.pad(x, (1, 1, 0, 1), mode="reflect"),
            "negative pad": lambda: functional.pad(x, (-1, 1, 0, -1)),
        }
        return forms[self.kind]()


class Channels(nn.Module):
    """Halves of the channels, swapped, or each through a layer of its own, or two that overlap."""

    def __init__(self, kind: str, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, first, second

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "overlap":
            return torch.cat([self.first(x[:, 1:3]), self.second(x[:, 0:2])], 1)
        left, right = x.chunk(2, 1)
        if self.kind == "swap":
            return torch.cat([right, left], 1)
        return torch.cat([self.first(left), self.second(right)], 1)


class Tap(nn.Module):
    """A value that is read both by what follows and by an activation."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.outer(y) + 0 * y.sigmoid().mean()  # type: ignore[no-any-return]


@st.composite
def convolutions(draw: st.DrawFn, inputs: int, outputs: int, *, stride: int = 1) -> nn.Module:
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 4) if inputs % g == 0 and outputs % g == 0]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (2, 2), (5, 3)]))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    whole = tuple((k - 1) * dilation // 2 for k in kernel)
    padding = draw(st.sampled_from([whole, whole, whole, (0, 0)]))
    mode = draw(st.sampled_from(MODES)) if draw(st.integers(0, 3)) == 0 else "zeros"
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )


@st.composite
def chains(draw: st.DrawFn, channels: int = 4, *, stride: int = 1, depth: int = 3) -> nn.Module:
    """One branch: layers in a row that keep the channels, the first of which may have the stride."""
    layers: list[nn.Module] = []
    for index in range(draw(st.integers(0 if stride == 1 else 1, depth))):
        step = stride if index == 0 else 1
        kinds = ["conv", "conv", "norm", "pool", "scale", "window", "padded norm"] if step == 1 else ["conv", "pool"]
        kind = draw(st.sampled_from(kinds))
        if kind == "conv":
            layers.append(draw(convolutions(channels, channels, stride=step)))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
        elif kind == "pool":
            size = draw(st.sampled_from([2, 3]))
            layers.append(
                nn.AvgPool2d(size, step, draw(st.sampled_from([0, size // 2])), count_include_pad=draw(st.booleans()))
            )
        elif kind == "scale":
            names = ["scale", "shift", "divide", "negate", "from", "half", "affine"]
            layers.append(Scale(channels, draw(st.sampled_from(names))))
        elif kind == "padded norm":
            layers += [NormAndPad(channels, 1), nn.Conv2d(channels, channels, 3, bias=False)]
        else:
            names = ["crop", "every second", "pad", "pad with a value", "pad by reflection", "negative pad"]
            layers.append(Window(draw(st.sampled_from(names))))
    if draw(st.booleans()):
        layers.append(nn.BatchNorm2d(channels))
    return nn.Sequential(*layers)


@st.composite
def sums(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A sum of one to three branches (or their concatenation), and its number of channels."""
    stride = draw(st.sampled_from([1, 1, 2]))
    count = draw(st.integers(1, 3))
    branches = [draw(chains(stride=stride)) for _ in range(count)]
    signs = [draw(st.sampled_from([1, 1, -1])) for _ in range(count)]
    is_side_by_side = count > 1 and draw(st.integers(0, 3)) == 0
    return Sum(branches, signs, is_side_by_side, draw(st.booleans())), 4 * count if is_side_by_side else 4


@st.composite
def nets(draw: st.DrawFn) -> nn.Module:
    """One or two blocks, each ended by what may follow a sum, with an activation between."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        block, channels = draw(sums())
        layers.append(block)
        ending = draw(st.sampled_from(["none", "norm", "scale", "halves", "tap"]))
        if ending == "norm":
            layers.append(nn.BatchNorm2d(channels))
        elif ending == "scale":
            layers.append(Scale(channels, "scale"))
        elif ending == "tap":
            layers.append(Tap(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)))
        elif ending == "halves" and channels == 4:
            kind = draw(st.sampled_from(["halves", "swap", "overlap"]))
            layers.append(Channels(kind, draw(convolutions(2, 2)), nn.BatchNorm2d(2)))
            if kind == "halves":
                # The two halves must agree in size: only a convolution that keeps it does.
                layers[-1].first = nn.Conv2d(2, 2, 3, padding=1)
            elif kind == "overlap":
                layers[-1].first = nn.Conv2d(2, 2, 1)
        layers.append(nn.ReLU())
        if channels != 4:
            layers.append(nn.Conv2d(channels, 4, 1))
    return nn.Sequential(*layers)


@settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(nets(), st.sampled_from([(9, 9), (8, 9), (10, 8)]), st.sampled_from([5, 2, 3, 4, 6, 7, 8, 1, 9, 10, 11, 0]))
def test_any_net_of_linear_blocks_computes_the_same_after_fusing(
    net: nn.Module, sizes: tuple[int, int], seed: int
) -> None:
    module = randomised(net, seed)
    x = noise((2, 4, *sizes))
    try:
        with torch.no_grad():
            y = module(*x)
    except RuntimeError:
        return  # a kernel larger than what is left of the image, a reflection wider than it
    if not y.numel() or not float(y.abs().max()):
        return
    # Free sizes cost most of the time in torch.export, so most nets have none: the seed tells which.
    free = {0: (True, True, True, True), 1: (True, False, False, False)}.get(seed, (False,) * 4)
    program = trace(module, x, may_vary=(free,))
    found = fuse_program(program, random_inputs(program, 1, seed))
    before, after = count_ops(found.plan.program), count_ops(found.program)
    assert all(after[kind] <= before[kind] for kind in ("norms", "ops"))
    assert difference(module, found.program, noise((3 if seed < 2 else 2, 4, *sizes), seed=1)) <= TOLERANCE
