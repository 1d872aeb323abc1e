"""Each published block becomes the stated number of operators, and gives what the original module gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.plan import count_ops
from repconv_cli.verdict import random_inputs
from tests.graph import models as m
from tests.graph.block_case import ONE, SMALL, Block, assert_fuses, sequence
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise


def _slices() -> nn.Module:
    """Two halves of the channels, each with its own convolution, put back together: one grouped convolution."""
    return Formula(
        lambda part, x: torch.cat([part.left(x[:, :2]), part.right(x[:, 2:])], 1),
        left=conv_bn(2, 4),
        right=conv_bn(2, 4),
    )


def _shortcut() -> nn.Module:
    """ResNet-D's shortcut, average pool then 1x1, beside a 3x3 of stride 2."""
    return Formula(
        lambda part, x: part.main(x) + part.down(x),
        main=conv_bn(4, 6, 3, stride=2),
        down=nn.Sequential(nn.AvgPool2d(2, 2), conv_bn(4, 6, 1)),
    )


BLOCKS = [
    Block("repvgg", m.RepVGG, ONE),
    Block("repvgg_without_norms", lambda: m.RepVGG(norms=False), ONE),
    Block("repvgg_stride_2", lambda: m.RepVGG(4, 6, stride=2), ONE),
    Block("repvgg_groups_2_identity_wraps_per_group", lambda: m.RepVGG(groups=2), ONE),
    Block(
        "repvgg_groups_4_identity_wraps_per_group", lambda: m.RepVGG(8, 8, groups=4), ONE, (2, 8, 7, 7), (3, 8, 6, 9)
    ),
    Block("mobileone_dense", m.MobileOne, ONE),
    Block("mobileone_depthwise", lambda: m.MobileOne(groups=4), ONE),
    Block("mobileone_depthwise_stride_2", lambda: m.MobileOne(groups=4, stride=2), ONE),
    Block("mobileone_pointwise", lambda: m.MobileOne(kernel=1), ONE),
    Block("acnet", m.ACNet, ONE),
    Block("diverse_branch", m.DiverseBranch, ONE),
    Block("diverse_branch_groups_2", lambda: m.DiverseBranch(groups=2), ONE),
    Block("replknet", m.RepLK, ONE),
    Block("unireplknet_dilated", m.UniRepLK, ONE),
    Block("repvit_norm_after_the_sum", m.RepViTMixer, ONE),
    Block("qarepvgg", m.QARepVGG, ONE),
    Block("repmixer", m.RepMixer, ONE),
    Block("ecbsr_sobel", m.SobelBranch, ONE),
    Block("sesr_collapsible", m.Collapsible, ONE),
    Block(
        "two_pointwise_concatenated",
        lambda: Formula(lambda p, x: torch.cat([p.a(x), p.b(x)], 1), a=conv_bn(4, 3, 1), b=conv_bn(4, 5, 1)),
        ONE,
    ),
    Block("slices_become_groups", _slices, ONE),
    Block("linear_with_low_rank_adapter", m.LowRank, (0, 0, 1), (2, 8), (3, 8)),
    Block("linear_with_adapter_on_tokens", m.LowRank, (0, 0, 1), (2, 3, 8), (3, 5, 8)),
    Block("two_norm_linear_heads_averaged", m.TwoHeads, (0, 0, 1), (2, 8), (3, 8)),
    Block("conv1d", sequence(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)), ONE, (2, 4, 9), (3, 4, 12)),
    Block(
        "conv3d",
        lambda: Formula(
            lambda p, x: p.bn(p.a(x) + p.b(x)),
            a=nn.Conv3d(2, 2, 3, padding=1),
            b=nn.Conv3d(2, 2, 1),
            bn=nn.BatchNorm3d(2),
        ),
        ONE,
        (2, 2, 4, 5, 5),
        (3, 2, 3, 4, 6),
    ),
    Block(
        "even_kernel_same",
        lambda: Formula(
            lambda p, x: p.a(x) + p.b(x), a=nn.Conv2d(4, 4, 4, padding="same"), b=nn.Conv2d(4, 4, 2, padding="same")
        ),
        ONE,
    ),
    Block(
        "even_kernel_beside_pointwise",
        lambda: Formula(
            lambda p, x: p.a(x) + p.b(x), a=nn.Conv2d(4, 4, 4, stride=2, padding=1), b=nn.Conv2d(4, 4, 2, stride=2)
        ),
        ONE,
        (2, 4, 8, 8),
        (3, 4, 8, 8),
    ),
    Block(
        "reflect_padding",
        lambda: Formula(lambda p, x: p.a(x) + p.b(x), a=conv_bn(4, 4, 3, padding_mode="reflect"), b=conv_bn(4, 4, 1)),
        (1, 0, 2),
    ),
    Block("pointwise_then_reflect", sequence(conv_bn(4, 4, 1), conv(4, 4, 3, padding_mode="reflect")), (1, 0, 2)),
    Block(
        "circular_padding",
        lambda: Formula(
            lambda p, x: p.a(x) + x - p.b(x), a=conv_bn(4, 4, 5, padding_mode="circular"), b=conv_bn(4, 4, 1)
        ),
        (1, 0, 2),
    ),
    Block("transposed_stride_2", sequence(nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6)), ONE),
    Block(
        "transposed_grouped_output_padding",
        sequence(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, bias=False), nn.BatchNorm2d(6)),
        ONE,
    ),
    Block("transposed_stride_1", sequence(nn.ConvTranspose2d(4, 6, 3, 1, 1), nn.BatchNorm2d(6)), ONE),
    Block(
        "transposed_stride_1_of_a_larger_output",
        sequence(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), conv(6, 6, 1)),
        ONE,
    ),
    Block(
        "transposed_stride_1_beside_a_smaller_one",
        lambda: Formula(
            lambda p, x: p.norm(p.a(x) - p.b(x)),
            a=nn.ConvTranspose2d(4, 4, 5, padding=1),
            b=nn.ConvTranspose2d(4, 4, 3, bias=False),
            norm=nn.BatchNorm2d(4),
        ),
        ONE,
    ),
    Block(
        "average_pool_branch",
        lambda: Formula(
            lambda p, x: p.a(x) + p.b(x), a=conv_bn(4, 4), b=nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4))
        ),
        ONE,
    ),
    Block(
        "sum_from_zero",
        lambda: Formula(lambda p, x: sum([p.a(x), p.b(x), x]), a=conv_bn(4, 4), b=conv_bn(4, 4, 1)),
        ONE,
    ),
    Block(
        "negation_and_difference",
        lambda: Formula(lambda p, x: -p.a(x) - (1.5 - p.b(x)), a=conv(4, 4), b=conv(4, 4, 1)),
        ONE,
    ),
    Block(
        "division_by_a_parameter",
        lambda: Formula(lambda p, x: (p.a(x) + x) / p.t / 3, a=conv_bn(4, 4), t=torch.ones(4, 1, 1)),
        ONE,
    ),
    Block("dropout_in_eval", sequence(conv(4, 4), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Dropout2d(0.1)), ONE),
    Block("stride_2_shortcut", _shortcut, ONE, (2, 4, 8, 8), (3, 4, 8, 8)),
    Block("scale_then_shift_stay_one_operator", lambda: Formula(lambda p, x: (x - 0.5) / 0.25), (0, 0, 1)),
    Block("norm_then_norm", sequence(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (0, 0, 1)),
    Block("norm_before_an_unpadded_conv", sequence(nn.BatchNorm2d(4), conv(4, 4, 3, padding=0)), ONE),
    Block("pad_as_its_own_layer", sequence(nn.ZeroPad2d((1, 1, 1, 1)), conv(4, 4, padding=0), nn.BatchNorm2d(4)), ONE),
    Block(
        "crop_and_stride_slices",
        lambda: Formula(lambda p, x: p.a(x)[:, :, ::2, ::2] + p.b(x), a=conv_bn(4, 4, 1), b=conv_bn(4, 4, 3, stride=2)),
        ONE,
    ),
    Block("conv_called_twice_is_fused_per_use", lambda: _twice(), (2, 0, 5), blocks=2),
    Block("weight_shared_by_two_blocks", lambda: _tied(), (2, 0, 5), blocks=2),
]


def _twice() -> nn.Module:
    return Formula(
        lambda p, x: p.first(p.shared(x)).relu() * p.second(p.shared(x.sin())),
        shared=conv(4, 4),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
    )


def _tied() -> nn.Module:
    model = Formula(lambda p, x: p.first(x).relu() * p.second(x.sin()), first=conv_bn(4, 4), second=conv_bn(4, 4))
    model.second[0].weight = model.first[0].weight  # type: ignore[index,union-attr]
    return model


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_becomes_the_stated_operators_and_computes_the_same(block: Block) -> None:
    assert_fuses(block)


def test_several_inputs_by_keyword_and_outputs_in_a_dict_keep_their_nesting() -> None:
    module = randomised(m.TwoInputs())
    x, other = noise(SMALL, (2, 4, 9, 9))
    found = fused(module, (x,), {"other": other})
    assert count_ops(found.program) == {"convs": 2, "norms": 0, "ops": 3}
    assert difference(module, found.program, (x,), {"other": other}) <= TOLERANCE


def test_batch_stays_free_with_two_inputs() -> None:
    module = randomised(m.TwoInputs())
    x, other = noise(SMALL, (2, 4, 9, 9))
    found = fused(module, (x,), {"other": other})
    assert [info.shape[0] for info in found.program.inputs] == [None, None]


def test_half_precision_weights_are_fused_in_float64_from_their_own_values() -> None:
    module = randomised(m.RepVGG()).to(torch.bfloat16)
    found = fused(module, tuple(t.to(torch.bfloat16) for t in noise(SMALL)))
    assert difference(module, found.program, noise(SMALL)) <= TOLERANCE
    program = found.plan.program
    cast = fuse_program(program, random_inputs(program, 1, 0), dtype=torch.bfloat16)
    assert found.program.tensors.keys() == cast.program.tensors.keys()
    for key, tensor in cast.program.tensors.items():
        assert torch.equal(tensor, found.program.tensors[key].to(torch.bfloat16))


@pytest.mark.parametrize(("padding", "operator"), [(0, "conv_transpose2d"), (1, "conv2d"), (2, "conv2d")])
def test_a_transposed_convolution_of_stride_1_is_written_as_what_is_less_work(padding: int, operator: str) -> None:
    module = randomised(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=padding), nn.BatchNorm2d(6)))
    found = fused(module, noise((2, 4, 7, 8)), is_spatial_free=False)
    (call,) = [node for node in found.program.graph.nodes if node.op == "call_function"]
    assert str(call.target).split(".")[1] == operator
    (block,) = found.plan.blocks
    assert block.after.macs == min(7 * 8, (9 - 2 * padding) * (10 - 2 * padding)) * 4 * 6 * 9
    assert block.before.macs == 7 * 8 * 4 * 6 * 9


def test_a_plain_convolution_with_wide_padding_stays_a_plain_one() -> None:
    module = randomised(nn.Sequential(nn.Conv2d(4, 6, 3, padding=2), nn.BatchNorm2d(6)))
    found = fused(module, noise((2, 4, 7, 8)), is_spatial_free=False)
    assert tuple(found.program.tensors["0.weight"].shape) == (6, 4, 3, 3)
