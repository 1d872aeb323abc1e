"""The drawing: branches add up to the kernel that is written, graphs are those of the plan, ranges are torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.drawing import draw
from repconv_cli.drawing.ranges import range_of
from repconv_cli.graph.plan import Plan, make_plan
from repconv_cli.graph.rewrite import fuse_block
from repconv_cli.graph.trace import trace
from repconv_cli.results import Picture


class Branches(nn.Module):
    """Branches on one input, combined by ``join``, and a norm after them if ``post`` is given."""

    def __init__(self, join: Callable[..., Tensor], *branches: nn.Module, post: nn.Module | None = None) -> None:
        super().__init__()
        self.join = join
        self.branches = nn.ModuleList(branches)
        self.post = post or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.post(self.join(*(branch(x) for branch in self.branches))))


def conv(*shape: int, norm: bool = True, **how: int) -> nn.Module:
    layer = nn.Conv2d(*shape, bias=False, **how)
    return nn.Sequential(layer, nn.BatchNorm2d(shape[1])) if norm else layer


def add(*values: Tensor) -> Tensor:
    return torch.stack([*values]).sum(0) if len(values) > 3 else sum(values[1:], values[0])


def beside(*values: Tensor) -> Tensor:
    return torch.cat(values, 1)


MODELS = {
    "repvgg": (lambda: Branches(add, conv(4, 4, 3, padding=1), conv(4, 4, 1), nn.BatchNorm2d(4)), 3),
    "difference": (lambda: Branches(torch.sub, conv(4, 4, 3, padding=1), conv(4, 4, 1)), 2),
    "norm after": (lambda: Branches(add, conv(4, 4, 3, padding=1), nn.Identity(), post=nn.BatchNorm2d(4)), 2),
    "depthwise": (lambda: Branches(add, conv(4, 4, 5, padding=2, groups=4), conv(4, 4, 3, padding=1, groups=4)), 2),
    "grouped": (lambda: Branches(add, conv(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)), 2),
    "asymmetric": (lambda: Branches(add, conv(4, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))), 2),
    "one branch": (lambda: Branches(add, conv(4, 4, 3, padding=1)), 1),
    "side by side": (lambda: Branches(beside, conv(4, 2, 3, padding=1), conv(4, 3, 3, padding=1)), 1),
}  # fmt: skip


def plan_of(model: nn.Module) -> Plan:
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return make_plan(trace(model.eval(), (torch.randn(2, 4, 9, 9),), {}))


def slices(picture: Picture) -> tuple[list[Tensor], list[Tensor]]:
    assert picture.fused is not None
    fused = [torch.tensor(taps) for taps in picture.fused.slices]
    total = [sum(torch.tensor(kernel.slices[n]) for kernel in picture.branches) for n in range(len(picture.pairs))]
    return fused, total  # type: ignore[return-value]


@pytest.mark.parametrize("name", MODELS)
def test_the_branches_add_up_to_the_kernel_that_is_written(name: str) -> None:
    make, branches = MODELS[name]
    plan = plan_of(make())
    (picture,) = draw(plan).pictures
    weight = next(iter(fuse_block(plan.blocks[0]).tensors().values()))
    assert len(picture.branches) == branches
    fused, total = slices(picture)
    for pair, one, other in zip(picture.pairs, fused, total, strict=True):
        torch.testing.assert_close(one.double(), weight[pair].flatten(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    assert picture.taps[0] * picture.taps[1] == len(picture.fused.rms)  # type: ignore[union-attr]


def test_the_largest_weight_and_a_channel_onto_itself_are_shown() -> None:
    plan = plan_of(MODELS["repvgg"][0]())
    (picture,) = draw(plan).pictures
    weight = next(iter(fuse_block(plan.blocks[0]).tensors().values()))
    assert float(weight[picture.pairs[0]].abs().max()) == float(weight.abs().max())
    assert any(output == channel for output, channel in picture.pairs)
    assert [kernel.label for kernel in picture.branches] == ["3×3", "1×1", "identity"]


def test_the_graphs_are_those_of_the_plan() -> None:
    drawing = draw(plan_of(MODELS["repvgg"][0]()))
    before = [node.op for node in drawing.before]
    assert before.count("conv2d") == 2
    assert before.count("batch_norm") == 3
    assert {node.block for node in drawing.before if node.op in ("conv2d", "batch_norm", "add")} == {0}
    assert [(node.op, node.block) for node in drawing.after] == [
        ("input", None),
        ("conv2d", 0),
        ("relu", None),
        ("output", None),
    ]
    assert drawing.after[1].weight == (4, 4, 3, 3)
    assert all(place < index for index, node in enumerate(drawing.before) for place in node.inputs)


def test_a_block_of_one_factor_has_no_kernel_and_says_so() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + x + x)

    (picture,) = draw(plan_of(Doubled())).pictures
    assert picture.fused is None
    assert "no kernel" in picture.note


def test_the_int8_error_is_that_of_rounding() -> None:
    weight = torch.randn(64, 32, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[0, 0, 0, 0] = 40.0
    facts = range_of("w", weight)
    scale = weight.abs().max() / 127
    rounded = (weight / scale).round() * scale
    measured = float((rounded - weight).square().mean().sqrt() / weight.square().mean().sqrt())
    assert facts.int8_error == pytest.approx(measured, rel=0.02)
    assert (facts.low, facts.high) == (float(weight.min()), 40.0)
    assert facts.int8_error_by_channel < facts.int8_error / 2
