"""Near misses: each is left as it is, with a reason that can be read, and the outputs stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repconv_cli.graph.plan import count_ops
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise
from tests.graph.refusal_case import SHAPE, Refused, assert_refused, fixed_size, formula, sequence


class NormWithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: a subclass of batch norm that carries its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def squeeze_excite(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    scaled: Tensor = part.norm(y * part.gate(y.mean((2, 3), keepdim=True)).sigmoid())
    return scaled


def inner_and_outer(part: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = part.conv(x)
    return y, part.norm(y)


def two_strided(size: int) -> Refused:
    return Refused(
        f"stride_2_3x3_under_a_padded_3x3_at_{size}",
        formula(
            fixed_size(lambda p, x: p.outer(p.inner(x))),
            inner=conv(4, 1, 3, stride=2, bias=False),
            outer=conv(1, 8, 3),
        ),
        r"zero padding 1 before reads a 3-wide kernel outside its output|outside its output",
        (2, 0, 3),
        (2, 4, size, size),
    )


REFUSED = [
    Refused(
        "depthwise_then_pointwise",
        sequence(conv(4, 4, 5, groups=4, bias=False), conv(4, 8, 1)),
        r"exact as one convolution, but 6\.06 times the work \(10,692 → 64,800 MACs\)",
        (2, 0, 2),
    ),
    Refused(
        "dilation_that_would_be_written_out",
        formula(lambda p, x: p.a(x) + p.b(x), a=conv(4, 4, 3, groups=4, dilation=4), b=conv(4, 4, 3, groups=4)),
        r"exact as one convolution, but 4\.5 times the work",
        (2, 0, 3),
    ),
    Refused(
        "two_3x3_in_a_row",
        sequence(conv(4, 4, 3, bias=False, padding=0), conv(4, 4, 3, padding=0)),
        r"exact as one convolution, but 1\.\d+ times the work",
        (2, 0, 2),
        (2, 4, 12, 12),
    ),
    Refused(
        "inner_value_is_also_an_output",
        formula(inner_and_outer, conv=conv(4, 4), norm=nn.BatchNorm2d(4)),
        r"a norm after conv2d, whose value is also read elsewhere",
        (1, 1, 2),
    ),
    Refused(
        "inner_value_is_read_by_an_activation",
        formula(lambda p, x: [p.norm(y := p.conv(x)), y.relu()], conv=conv(4, 4), norm=nn.BatchNorm2d(4)),
        r"a norm after conv2d, whose value is also read elsewhere",
        (1, 1, 3),
    ),
    Refused(
        "activation_between_the_branches",
        formula(lambda p, x: p.a(x) + p.b(x).relu(), a=conv(4, 4), b=conv(4, 4)),
        r"no common linear source: .*relu.* between",
        (2, 0, 4),
    ),
    Refused(
        "data_dependent_scale",
        formula(squeeze_excite, conv=conv(4, 4), norm=nn.BatchNorm2d(4), gate=conv(4, 4, 1)),
        r"the scale depends on the input, so it is no constant map",
        (2, 1, 6),
    ),
    Refused(
        "biased_1x1_before_a_padded_3x3",
        sequence(conv(4, 4, 1), conv(4, 4, 3)),
        r"a biased map before zero padding: the padding is zero, the map evaluated there is not",
        (2, 0, 2),
    ),
    Refused(
        "stride_mismatch",
        formula(lambda p, x: p.a(x)[:, :, :5, :5] + p.b(x), a=conv(4, 4), b=conv(4, 4, stride=2)),
        r"stride 1×1 beside stride 2×2",
        (2, 0, 4),
    ),
    Refused(
        "reflect_beside_zeros",
        formula(lambda p, x: p.a(x) + p.b(x), a=conv(4, 4, padding_mode="reflect"), b=conv(4, 4)),
        r"padding modes differ where kernels reach past the border: reflect beside zeros",
        (2, 0, 4),
    ),
    Refused(
        "reflect_after_a_3x3",
        sequence(conv(4, 4, 3, bias=False), conv(4, 4, 3, padding_mode="reflect")),
        r"reflect padding after a 3×3 convolution",
        (2, 0, 3),
    ),
    Refused(
        "pool_in_ceil_mode",
        sequence(conv(4, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True)),
        r"average pool in ceil mode: windows past the border average fewer values",
        (1, 0, 2),
    ),
    Refused(
        "pool_that_leaves_padding_uncounted",
        formula(lambda p, x: p.a(x) + p.b(x), a=conv(4, 4), b=nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        r"average pool that leaves padding uncounted averages fewer values at the border",
        (1, 0, 3),
    ),
    Refused(
        "part_of_the_channels_before_a_pointwise",
        formula(
            lambda p, x: p.mix(torch.cat([p.part(x[:, :2]), x[:, 2:]], 1)),
            part=conv(2, 2, bias=False),
            mix=conv(8, 8, 1),
        ),
        r"exact as one convolution, but 5\.76 times the work",
        (2, 0, 5),
        (2, 8, 9, 9),
    ),
    Refused(
        "lone_norm_after_an_activation",
        formula(lambda p, x: p.norm(p.conv(x).relu()), conv=conv(4, 4), norm=nn.BatchNorm2d(4)),
        r"a norm after relu, with no convolution to fold into",
        (1, 1, 3),
    ),
    Refused(
        "norm_subclass_with_an_activation_inside",
        formula(lambda p, x: p.b(p.norm(p.a(x))), a=conv(4, 4), norm=NormWithActivation(4), b=nn.BatchNorm2d(4)),
        r"a norm after relu, with no convolution to fold into",
        (1, 1, 3),
    ),
    Refused(
        "stride_2_shortcut_alone",
        sequence(nn.AvgPool2d(2, 2), conv(4, 6, 1)),
        r"exact as one convolution, but 4 times the work",
        (1, 0, 2),
        (2, 4, 8, 8),
    ),
    Refused(
        "pointwise_before_a_pool_of_its_stride",
        sequence(conv(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.AvgPool2d(2, 2)),
        r"exact as one convolution, but for the same work with 4 times the weights",
        (1, 0, 2),
        (2, 4, 8, 8),
    ),
    two_strided(8),
    Refused(
        "norm_before_a_padded_conv",
        sequence(nn.BatchNorm2d(4), conv(4, 4, 3)),
        r"cannot be folded into what reads it: a biased map before zero padding",
        (1, 1, 2),
    ),
    Refused(
        "norm_over_the_batch_itself",
        sequence(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)),
        r"own statistics, not running ones",
        (1, 1, 2),
    ),
    Refused("instance_norm", sequence(conv(4, 4), nn.InstanceNorm2d(4, affine=True)), r"over the sample", (1, 0, 2)),
    Refused("group_norm", sequence(conv(4, 4), nn.GroupNorm(2, 4)), r"over the sample", (1, 0, 2)),
    Refused("layer_norm", sequence(conv(4, 4), nn.LayerNorm(9)), r"over the sample", (1, 0, 2)),
    Refused(
        "part_of_the_channels_alone",
        formula(lambda p, x: torch.cat([p.part(x[:, :2]), x[:, 2:]], 1).relu(), part=conv(2, 2)),
        r"times the work",
        (1, 0, 5),
        (2, 8, 9, 9),
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_near_miss_is_left_with_its_reason_and_computes_the_same(case: Refused) -> None:
    assert_refused(case)


def test_two_inputs_summed_are_no_block_and_the_reason_names_both() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(4, 4), conv(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)  # type: ignore[no-any-return]

    module = randomised(Sum())
    found = fused(module, noise(SHAPE, SHAPE))
    assert count_ops(found.program) == {"convs": 2, "norms": 0, "ops": 3}
    assert [r.reason for r in found.plan.refusals] == [
        "the branches have no common linear source: input x, input y between"
    ]
    assert difference(module, found.program, noise(SHAPE, SHAPE, seed=1)) <= TOLERANCE


def test_stride_2_under_a_padded_3x3_is_composed_at_odd_sizes_where_it_is_exact() -> None:
    case = two_strided(9)
    module = randomised(case.make())
    found = fused(module, noise(case.shape), is_spatial_free=False)
    assert not any("outside its output" in refusal.reason for refusal in found.plan.refusals)
    assert difference(module, found.program, noise((3, *case.shape[1:]), seed=1)) <= TOLERANCE


def test_a_refused_model_keeps_its_graph_node_for_node() -> None:
    module = randomised(nn.Sequential(conv(4, 4, 1), conv(4, 4, 3)))
    found = fused(module, noise(SHAPE))
    before = [(node.op, str(node.target)) for node in found.plan.program.graph.nodes]
    assert [(node.op, str(node.target)) for node in found.program.graph.nodes] == before
    assert found.program.tensors.keys() == found.plan.program.tensors.keys()
    assert found.plan.blocks == ()


def test_a_border_strip_with_another_constant_stays_written() -> None:
    """The linear part is one convolution, the constant is not uniform: no operator computes that."""

    def overwritten(part: Any, x: Tensor) -> Tensor:
        y = part.norm(part.conv(x))
        y[:, :, 0:1, :] = part.norm.bias.view(1, -1, 1, 1)
        return y

    module = randomised(Formula(overwritten, conv=conv(4, 4, 1, padding=1), norm=nn.BatchNorm2d(4)))
    found = fused(module, noise(SHAPE))
    assert count_ops(found.program)["norms"] == 0
    assert difference(module, found.program, noise(SHAPE, seed=1)) <= TOLERANCE


def test_a_border_that_is_wrong_in_a_small_channel_alone_is_no_uniform_constant() -> None:
    """Each channel is judged by its own scale: 1e-8 of difference counts where the channel is of scale 1e-8."""
    scales = torch.tensor([1e6, 1e-8, 1.0, 1.0])

    def padded_with_its_shift_but_for_channel_1(part: Any, x: Tensor) -> Tensor:
        y = functional.pad((x + part.shift.view(1, -1, 1, 1)) * part.scale.view(1, -1, 1, 1), [1] * 4)
        column = (part.shift * part.scale * torch.tensor([1.0, 0.0, 1.0, 1.0])).view(1, -1, 1, 1)
        for strip in (y[:, :, :1], y[:, :, -1:], y[:, :, :, :1], y[:, :, :, -1:]):
            strip.copy_(column.expand_as(strip))
        return part.conv(y)  # type: ignore[no-any-return]

    module = randomised(
        Formula(
            padded_with_its_shift_but_for_channel_1,
            shift=torch.ones(4),
            scale=torch.ones(4),
            conv=conv(4, 4, padding=0, groups=4, bias=False),
        )
    )
    with torch.no_grad():
        module.scale.copy_(scales)  # type: ignore[operator]
    found = fused(module, noise(SHAPE), is_spatial_free=False)
    assert difference(module, found.program, noise(SHAPE, seed=1)) <= TOLERANCE


class Residual(nn.Module):
    """A residual block as in ResNet: a shortcut, with a projection or without, around layers with an activation."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.projection = conv(4, 4), conv(4, 4), projection

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + self.projection(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("projection", [nn.Identity(), conv(4, 4, 1)], ids=["identity", "projection"])
def test_an_ordinary_residual_connection_is_no_refusal(projection: nn.Module) -> None:
    found = fused(randomised(nn.Sequential(conv(4, 4), nn.ReLU(), Residual(projection))), noise(SHAPE))
    assert found.plan.refusals == ()


REWORDED = [
    (
        "a learned position",
        lambda p, x: p.norm(p.conv(x) + p.c),
        "a constant that differs from place to place is added",
    ),
    ("a learned mask", lambda p, x: p.norm(p.conv(x) * p.c), "a scale that differs from place to place"),
    (
        "an image above another",
        lambda p, x: p.norm(torch.cat([p.conv(x), p.conv(x)], 2)),
        "values side by side along another axis than the channels",
    ),
    ("an input that is normalised", lambda p, x: p.conv((x - 0.5) / 0.2), "a biased map before zero padding"),
]


@pytest.mark.parametrize(("name", "function", "reason"), REWORDED, ids=[case[0] for case in REWORDED])
def test_a_reason_names_what_stands_there(name: str, function: Callable[..., Any], reason: str) -> None:
    module = randomised(Formula(function, conv=conv(4, 4), norm=nn.BatchNorm2d(4), c=torch.ones(1, 4, 9, 9)))
    found = fused(module, noise(SHAPE), is_spatial_free=False)
    assert any(reason in refusal.reason for refusal in found.plan.refusals), found.plan.refusals
    assert all(refusal.name for refusal in found.plan.refusals), name
