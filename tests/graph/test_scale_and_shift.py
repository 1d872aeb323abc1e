"""A factor and a constant for each channel: what is neutral is not written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.graph.rules import aten
from tests.graph.models import Formula, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise

C = 4
SHAPE = (2, C, 5, 6)
WRITTEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], object]] = {
    "a factor": (lambda p, x: (x * p.w) * 2.0, aten.mul.Tensor),
    "a constant": (lambda p, x: (x + p.w) - p.b, aten.add.Tensor),
    "a constant on either side": (lambda p, x: p.b + (x + p.w), aten.add.Tensor),
    "both": (lambda p, x: x * p.w + p.b, aten.addcmul.default),
    "factors that cancel": (lambda p, x: (x * 4.0 + p.w) / 4.0, aten.add.Tensor),
    "constants that cancel": (lambda p, x: (x + p.b) * p.w - p.b * p.w, aten.mul.Tensor),
    "a norm": (lambda p, x: p.norm(x) + p.b, aten.addcmul.default),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_one_operator_is_written_without_what_is_neutral(name: str) -> None:
    body, target = WRITTEN[name]
    # Powers of two, so that what cancels cancels in every bit.
    powers = torch.tensor([1.0, -2.0, 0.5, 4.0]).reshape(C, 1, 1)
    module = randomised(
        Formula(
            lambda p, x: body(p, x.relu()).relu(),
            w=nn.Parameter(powers),
            b=nn.Parameter(powers * 8),
            norm=nn.BatchNorm2d(C),
        )
    )
    with torch.no_grad():
        module.w.copy_(powers)
        module.b.copy_(powers * 8)
    found = fused(module, noise(SHAPE), is_spatial_free=False)
    calls = [node.target for node in found.program.graph.nodes if node.op == "call_function"]
    assert calls == [aten.relu.default, target, aten.relu.default], found.program.graph
    assert difference(module, found.program, noise(SHAPE, seed=1)) <= TOLERANCE
