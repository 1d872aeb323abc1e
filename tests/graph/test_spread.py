"""A norm over layers side by side goes into each of them, whatever each reads; one before an average goes behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.facts import totals
from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.interpret import run_program
from repconv_cli.graph.plan import count_ops, make_plan
from repconv_cli.graph.spread import spread_norms
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise

SHAPE = (2, 8, 9, 9)


class MixedConv(nn.Module):
    """Tan and Le 2019, *MixConv*: the channels in groups, a depthwise kernel of another size for each."""

    def __init__(self, channels: int = 8, kernels: tuple[int, ...] = (3, 5), stride: int = 1) -> None:
        super().__init__()
        self.width = channels // len(kernels)
        self.parts = nn.ModuleList(conv(self.width, self.width, k, groups=self.width, stride=stride) for k in kernels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        pieces = x.split(self.width, 1)
        y: Tensor = self.norm(torch.cat([part(piece) for part, piece in zip(self.parts, pieces, strict=True)], 1))
        return y.relu()


def two_inputs(p: Any, x: Tensor) -> Tensor:
    y: Tensor = p.norm(torch.cat([p.a(x.sigmoid()), p.b(x.relu()), p.c(x.tanh())], 1))
    return y.relu()


def test_the_norm_of_mixed_kernels_goes_into_each_of_them() -> None:
    for module in (MixedConv(), MixedConv(8, (3, 5, 7, 9)), MixedConv(stride=2)):
        found = fused(randomised(module), noise(SHAPE), is_spatial_free=False)
        counts = count_ops(found.program)
        assert (counts["convs"], counts["norms"]) == (len(module.parts), 0)
        assert len(found.certificates) == len(module.parts)
        assert difference(module, found.program, noise((3, *SHAPE[1:]), seed=1)) <= TOLERANCE


def test_layers_on_inputs_of_their_own_take_their_part_of_the_norm() -> None:
    module = randomised(
        Formula(
            two_inputs,
            a=conv(8, 3),
            b=conv(8, 4, 1, bias=False),
            c=nn.ConvTranspose2d(8, 2, 3, padding=1),
            norm=nn.BatchNorm2d(9),
        )
    )
    found = fused(module, noise(SHAPE))
    assert count_ops(found.program) == {"convs": 3, "norms": 0, "ops": 8}
    assert {block.target for block in found.plan.blocks} >= {"a", "b"}
    for shape in ((3, *SHAPE[1:]), (1, 8, 12, 10)):
        assert difference(module, found.program, noise(shape, seed=1)) <= TOLERANCE


def test_the_counts_before_are_those_of_the_model() -> None:
    program = trace(randomised(MixedConv()), noise(SHAPE))
    plan = make_plan(program)
    assert plan.source is program
    found = totals(plan)
    assert (found.norms.before, found.norms.after, found.ops.after) == (1, 0, 5)
    assert found.ops.before == count_ops(program)["ops"] == 6
    assert found.macs.before == found.macs.after


def test_the_spread_graph_computes_the_same_to_the_bit() -> None:
    program = trace(randomised(MixedConv()), noise(SHAPE))
    before = str(program.graph)
    spread, parts = spread_norms(program)
    assert [len(names) for names in parts.values()] == [2]
    x = noise(SHAPE, seed=3)
    assert torch.equal(run_program(program, x)[0][0], run_program(spread, x)[0][0])
    assert str(program.graph) == before


def test_a_norm_goes_into_all_of_its_parts_or_none() -> None:
    module = randomised(nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(), MixedConv()))
    program = trace(module, noise(SHAPE))
    names = [block.name for block in make_plan(program).blocks]
    assert len(names) == 3
    for only, norms in ((names[0], 1), (names[1], 1), (names[2], 1)):
        found = fuse_program(program, random_inputs(program, 1, 0), only=only)
        assert count_ops(found.program)["norms"] == norms
        assert len(found.plan.blocks) == (1 if only == names[0] else 2)
        assert difference(module, found.program, noise(SHAPE, seed=1)) <= TOLERANCE
    assert make_plan(program, only=names[0]).program is program


def test_parts_that_others_read_or_that_are_no_layers_leave_the_norm_whole() -> None:
    def read_twice(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = p.a(x.sigmoid())
        return p.norm(torch.cat([y, p.b(x.relu())], 1)).relu(), y

    def beside_the_input(p: Any, x: Tensor) -> Tensor:
        y: Tensor = p.norm(torch.cat([p.a(x.sigmoid()), x.relu()], 1))
        return y.relu()

    def concatenation_read_twice(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cat([p.a(x.sigmoid()), p.b(x.relu())], 1)
        return p.norm(y).relu(), y

    for function, width in ((read_twice, 8), (beside_the_input, 12), (concatenation_read_twice, 8)):
        parts = {"a": conv(8, 4), "norm": nn.BatchNorm2d(width)}
        if function is not beside_the_input:
            parts["b"] = conv(8, 4)
        module = randomised(Formula(function, **parts))
        found = fused(module, noise(SHAPE), is_spatial_free=False)
        assert count_ops(found.program)["norms"] == 1
        assert found.plan.program is found.plan.source


AVERAGES: dict[str, Any] = {
    "mean": lambda p, x: p.fc(p.norm(x.relu()).mean((2, 3))),
    "mean_that_keeps_axes": lambda p, x: p.fc(p.norm(x.relu()).mean((-1, -2), keepdim=True).flatten(1)),
    "mean_over_one_axis": lambda p, x: p.wide(p.norm(x.relu()).mean(3).flatten(1)),
    "adaptive_pool": lambda p, x: p.fc(nn.functional.adaptive_avg_pool2d(p.norm(x.relu()), 1).flatten(1)),
    "adaptive_pool_to_more": lambda p, x: p.conv(nn.functional.adaptive_avg_pool2d(p.norm(x.relu()), (2, 4))),
    "two_heads": lambda p, x: p.fc(p.norm(x.relu()).mean((2, 3))).softmax(1) + p.two(p.norm(x.relu()).mean((2, 3))),
}
KEPT: dict[str, Any] = {
    "read_elsewhere_too": lambda p, x: (y := p.norm(x.relu())).mean((2, 3)).sum() + y.sigmoid(),
    "mean_over_channels": lambda p, x: p.norm(x.relu()).mean(1).flatten(1),
    "mean_over_samples": lambda p, x: p.norm(x.relu()).mean((0, 2, 3)),
    "largest": lambda p, x: p.fc(nn.functional.adaptive_max_pool2d(p.norm(x.relu()), 1).flatten(1)),
    "activation_behind_it": lambda p, x: p.fc(p.norm(x.relu()).mean((2, 3)).relu()),
}


def averaged(body: Any) -> nn.Module:
    parts = {"fc": nn.Linear(8, 5), "two": nn.Linear(8, 5), "wide": nn.Linear(72, 5), "conv": nn.Conv2d(8, 5, 1)}
    return randomised(Formula(body, norm=nn.BatchNorm2d(8), **parts))


@pytest.mark.parametrize("name", AVERAGES)
def test_a_norm_before_an_average_goes_into_the_classifier_behind_it(name: str) -> None:
    module = averaged(AVERAGES[name])
    found = fused(module, noise(SHAPE), is_spatial_free=False)
    assert count_ops(found.program)["norms"] == 0
    assert totals(found.plan).norms.before == (2 if name == "two_heads" else 1)
    for batch in (1, 3):
        assert difference(module, found.program, noise((batch, *SHAPE[1:]), seed=batch)) <= TOLERANCE


@pytest.mark.parametrize("name", KEPT)
def test_a_norm_that_nothing_takes_stays_where_it_is(name: str) -> None:
    module = averaged(KEPT[name])
    found = fused(module, noise(SHAPE), is_spatial_free=False)
    assert found.plan.program is found.plan.source
    assert count_ops(found.program)["norms"] == 1
    assert difference(module, found.program, noise(SHAPE, seed=1)) <= TOLERANCE
