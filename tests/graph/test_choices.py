"""A model that picks among scores is compared with one choice for both forms, and a wrong one still fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.graph.choices import has_choices, run_choosing
from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.trace import trace
from repconv_cli.options import Limits
from repconv_cli.results import Verification
from repconv_cli.verdict import compare, proof_inputs, random_inputs
from tests.graph.models import RepVGG, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 64, 64)


class Picks(nn.Module):
    """Scores that are nearly tied decide which features come first, as queries of a detector do."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block = RepVGG()
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.block(x)).flatten(2)
        scores = 1 + 1e-6 * features.mean(1)
        return features.gather(2, self.pick(scores)[:, None].expand(-1, 4, -1))


PICKS = {
    "topk": lambda scores: scores.topk(1000).indices,
    "sort": lambda scores: scores.sort(descending=True).indices[:, :1000],
    "argsort": lambda scores: scores.argsort(1, descending=True)[:, :1000],
    "argmax": lambda scores: scores.argmax(1, keepdim=True),
    "max": lambda scores: scores.max(1, keepdim=True).indices,
}


def fused_pair(pick: Callable[[Tensor], Tensor]) -> tuple[Program, Program]:
    program = trace(randomised(Picks(pick)), noise(SHAPE))
    return program, fuse_program(program, proof_inputs(program, 0), dtype=torch.float32).program


def judge(program: Program, fused: Program) -> Verification:
    models = ProgramModule(program), ProgramModule(fused)
    return compare(program, models[0], fused, models[1], random_inputs(program, 3, 0), Limits())


@pytest.mark.parametrize("name", PICKS)
def test_rounding_that_reorders_rows_is_no_difference(name: str) -> None:
    program, fused = fused_pair(PICKS[name])
    assert has_choices(program)
    found = judge(program, fused)
    assert found.verdict == "pass"
    assert found.assumptions[0].startswith("which values are chosen")


@pytest.mark.parametrize("name", PICKS)
@pytest.mark.parametrize("factor", [2.0, -1.0, 1.001])
def test_a_wrong_block_before_a_choice_fails(name: str, factor: float) -> None:
    program, fused = fused_pair(PICKS[name])
    key = next(key for key in fused.tensors if key.endswith("weight"))
    wrong = replace(fused, tensors={**fused.tensors, key: fused.tensors[key] * factor})
    assert judge(program, wrong).verdict == "fail"


def test_without_one_choice_the_rows_would_differ():
    program, fused = fused_pair(PICKS["topk"])
    (x,) = next(random_inputs(program, 1, 0))
    with torch.no_grad():
        difference = (ProgramModule(program)(x) - ProgramModule(fused)(x)).abs().max()
        first = run_choosing(program, (x,), in_double=False)
        second = run_choosing(fused, (x,), in_double=False, chosen=first.chosen)
    assert difference > 0.01
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_a_maximum_whose_place_nobody_reads_is_no_choice():
    program = trace(randomised(nn.Sequential(RepVGG(), nn.AdaptiveMaxPool2d(1))), noise(SHAPE))
    assert not has_choices(program)
