"""What may be read as a constant in float64: values that come out the same in the model's own types."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repconv_cli
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.trace import trace
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 8, 8)
COUNT = 101


def buckets(last: int) -> Tensor:
    """Return the buckets of distances that T5 has, the logarithm in float32."""
    distance = torch.arange(1, last + 1).float()
    return (8 + torch.log(distance / 8) / math.log(16) * 8).long().clamp(0, COUNT - 1)


# Whole numbers made of float32 values, and whether float64 values give the same ones.
CHOICES: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "truncated": (lambda: (torch.linspace(0, 1, COUNT) * 100).long(), False),
    "floored": (lambda: (torch.arange(COUNT) * 0.1 / 0.1).floor().long(), False),
    "divided": (lambda: (torch.arange(COUNT) * 0.07 // 0.01).clamp(0, COUNT - 1).long(), False),
    "compared": (lambda: (lambda x: (x * 0.3 / 0.3 > x).long())(torch.arange(COUNT) / 10), False),
    "compared with a number": (lambda: (torch.arange(COUNT) / 10 > 0.1).long(), False),
    "sorted": (lambda: torch.argsort(torch.sin(torch.arange(COUNT) * 1.0) * 1e-7 + 1), False),
    "largest": (lambda: (torch.sin(torch.arange(COUNT) * 1.0) * 1e-7 + 1).topk(9)[1], False),
    "rounded": (lambda: (torch.linspace(0, 1, COUNT) * 100).round().long(), True),
    "halves": (lambda: (torch.arange(COUNT) / 2).floor().long(), True),
    "buckets": (lambda: buckets(90), True),
    "positions": (lambda: torch.arange(COUNT).flip(0), True),
}


def made(choice: Callable[[], Tensor]) -> nn.Module:
    """Return a block and a sum of rows that are chosen from a table."""

    def forward(p: Any, x: Tensor) -> Tensor:
        return p.norm(p.conv(x)) + p.table(choice()).sum(0)[:, None, None]  # type: ignore[no-any-return]

    return randomised(Formula(forward, conv=conv(4, 4), norm=nn.BatchNorm2d(4), table=nn.Embedding(COUNT, 4)))


@pytest.mark.parametrize(("choice", "is_same"), CHOICES.values(), ids=CHOICES)
def test_a_choice_among_rounded_values_is_a_constant_if_float64_makes_the_same(
    choice: Callable[[], Tensor], is_same: bool
) -> None:
    program = trace(made(choice), noise(SHAPE))
    (rows,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.embedding.default)
    assert (rows in Constants(program)) is is_same


@pytest.mark.parametrize("choice", [case[0] for case in CHOICES.values()], ids=CHOICES)
def test_choices_are_those_of_the_model(choice: Callable[[], Tensor], tmp_path: Path) -> None:
    module, out = made(choice), tmp_path / "out.safetensors"
    result = repconv_cli.fuse(module, out, input=SHAPE)
    assert len(result.blocks) == 1
    assert result.verification
    (x,) = noise(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(repconv_cli.load(out)(x), module(x), rtol=1e-5, atol=1e-4)
