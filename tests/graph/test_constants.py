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


# Numbers that a type rounds where they are made.
ROUNDED: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.full((4, 1, 1), 0.1, dtype=torch.bfloat16),
    lambda x: torch.linspace(0.1, 1, 4, dtype=torch.bfloat16).view(4, 1, 1),
    lambda x: torch.arange(0, 0.4, 0.1, dtype=torch.float16).view(4, 1, 1),
    lambda x: torch.scalar_tensor(0.1, dtype=torch.bfloat16),
    lambda x: x.bfloat16().new_full((4, 1, 1), 0.1),
    lambda x: torch.full_like(torch.arange(4).half(), 0.1).view(4, 1, 1),
    lambda x: torch.arange(4).bfloat16().fill_(0.1).view(4, 1, 1),
]


@pytest.mark.parametrize("make", ROUNDED)
def test_a_number_is_what_its_type_holds(make: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    module = randomised(Formula(lambda p, x: p.norm(p.conv(x)) * make(x), conv=conv(4, 4), norm=nn.BatchNorm2d(4)))
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors", input=SHAPE)
    assert len(result.blocks) == 1
    (x,) = noise(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(repconv_cli.load(tmp_path / "out.safetensors")(x), module(x), rtol=1e-5, atol=1e-5)


# The type that something is calculated in, and the type of what reads it.
CALCULATED: list[tuple[Callable[[Any], Tensor], torch.dtype, int]] = [
    (lambda p: (p.scale.half() * 0.3).exp(), torch.float32, 0),
    (lambda p: (p.scale.half() * 0.3).exp().float(), torch.float32, 0),
    (lambda p: torch.ones(4, 1, 1).mul(1.1), torch.float64, 0),
    (lambda p: (p.scale * 0.3).exp(), torch.float32, 1),
    (lambda p: torch.ones(4, 1, 1).mul(1.1), torch.float32, 1),
    (lambda p: torch.full((4, 1, 1), 0.1).bfloat16().float(), torch.float32, 0),
    (lambda p: torch.full((4, 1, 1), 0.1, dtype=torch.half).transpose(0, 1).transpose(0, 1).float(), torch.float32, 1),
]


@pytest.mark.parametrize(("make", "dtype", "blocks"), CALCULATED)
def test_what_fewer_digits_round_is_not_calculated_with(
    make: Callable[[Any], Tensor], dtype: torch.dtype, blocks: int, tmp_path: Path
) -> None:
    module = randomised(Formula(lambda p, x: p.conv(x) * make(p), conv=conv(4, 4)))
    module.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
    module.conv.to(dtype)
    (x,) = (value.to(dtype) for value in noise(SHAPE))
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors", args=(x,))
    assert result.verification is not None
    assert (result.verification.verdict, len(result.blocks)) == ("pass", blocks)
    with torch.no_grad():
        found, expected = repconv_cli.load(tmp_path / "out.safetensors")(x), module(x)
    close = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(found, expected, rtol=close, atol=close * float(expected.abs().max()))


@pytest.mark.parametrize("choice", [case[0] for case in CHOICES.values()], ids=CHOICES)
def test_choices_are_those_of_the_model(choice: Callable[[], Tensor], tmp_path: Path) -> None:
    module, out = made(choice), tmp_path / "out.safetensors"
    result = repconv_cli.fuse(module, out, input=SHAPE)
    assert len(result.blocks) == 1
    assert result.verification
    (x,) = noise(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(repconv_cli.load(out)(x), module(x), rtol=1e-5, atol=1e-4)
