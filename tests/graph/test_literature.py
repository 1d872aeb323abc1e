"""Blocks of the literature beyond the plain ones: computed weights, edge kernels, mobile stages, other axes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from repconv_cli.graph.plan import count_ops
from tests.graph import models as m
from tests.graph import models_axes as axes
from tests.graph import models_mlp as mlp
from tests.graph import models_mobile as mobile
from tests.graph import models_restoration as restoration
from tests.graph import models_weights as weights
from tests.graph.block_case import ONE, Block, assert_fuses, sequence
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise

EIGHT, EIGHT_OTHER = (2, 8, 7, 8), (3, 8, 10, 9)
LINE, LINE_OTHER = (2, 4, 9), (3, 4, 12)
CUBE, CUBE_OTHER = (2, 4, 4, 5, 4), (3, 4, 5, 4, 6)

COMPUTED_WEIGHTS = [
    Block("orepa_squeezed_into_one_weight", weights.OnlineRep, ONE),
    Block("orepa_5x5", lambda: weights.OnlineRep(4, 5), ONE),
    Block("orepa_frozen_branches_as_layers", weights.FrozenBranches, ONE),
    Block("do_conv", lambda: nn.Sequential(weights.DepthwiseOver(), nn.BatchNorm2d(6)), ONE),
    Block("do_conv_groups_2", lambda: nn.Sequential(weights.DepthwiseOver(groups=2), nn.BatchNorm2d(6)), ONE),
    Block("do_conv_beside_pointwise", lambda: _beside(weights.DepthwiseOver(), conv_bn(4, 6, 1)), ONE),
    Block("weight_standardised", lambda: nn.Sequential(weights.Standardised(), nn.BatchNorm2d(4)), ONE),
    Block(
        "weight_standardised_by_batch_norm_of_the_weight",
        lambda: nn.Sequential(weights.StandardisedByNorm(4, 4, 3), nn.BatchNorm2d(4)),
        ONE,
    ),
    Block("weight_norm", lambda: nn.Sequential(parametrizations.weight_norm(conv(4, 4)), nn.BatchNorm2d(4)), ONE),
    Block(
        "weight_norm_per_input_channel",
        lambda: _beside(parametrizations.weight_norm(conv(4, 4), dim=1), conv_bn(4, 4, 1)),
        ONE,
    ),
    Block("spectral_norm", lambda: nn.Sequential(parametrizations.spectral_norm(conv(4, 4)), nn.BatchNorm2d(4)), ONE),
    Block("central_difference", weights.CentralDifference, ONE),
    Block("angular_and_horizontal_difference", weights.RadialDifference, ONE),
    Block("pruned_by_a_mask", lambda: nn.Sequential(weights.MaskedWeight(), nn.BatchNorm2d(4)), ONE),
    Block(
        "orthogonal_weight",
        lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.BatchNorm1d(6)),
        (0, 0, 1),
        (2, 6),
        (3, 6),
    ),
]

RESTORATION = [
    Block("ecbsr_sobel_x_and_y_and_laplacian", restoration.EdgeBlock, ONE),
    Block("ecbsr_without_identity", lambda: restoration.EdgeBlock(4, 6), ONE),
    Block("sesr_net", restoration.CollapsibleNet, (5, 0, 11), (2, 1, 7, 8), (3, 1, 10, 9), blocks=5),
    Block("expanded_chain", restoration.PlainChain, ONE),
    Block("repsr", restoration.RepSR, ONE),
]

MOBILE = [
    Block("repghost", mobile.RepGhost, (2, 0, 4), blocks=2),
    Block("ghostnetv3", mobile.GhostV3, (2, 0, 5), blocks=2),
    Block("mobileone_depthwise_then_pointwise", mobile.MobileOneStage, (2, 0, 4), blocks=2),
    Block("mobileone_stage_stride_2", lambda: mobile.MobileOneStage(stride=2), (2, 0, 4), blocks=2),
    Block("fastvit_positional_conv", mobile.PositionalConv, ONE),
    Block("cpvt_positional_conv", lambda: mobile.PositionalConv(kernel=3), ONE),
    Block("pp_lcnetv3_learned_affine", mobile.LearnableRep, ONE),
    Block("pp_lcnetv3_depthwise_5x5_stride_2", lambda: mobile.LearnableRep(4, 5, 2, 4, 2), ONE),
    Block("pp_lcnetv3_affine_after_the_activation", mobile.LearnableRepStage, (2, 0, 3), blocks=2),
    Block("yolo_plus_zero", mobile.PlusZero, (1, 0, 2)),
    Block(
        "bottleneck_with_dropout_everywhere",
        sequence(
            nn.Dropout(0.2),
            conv(4, 4, bias=False),
            nn.Dropout2d(0.2),
            nn.BatchNorm2d(4),
            nn.AlphaDropout(0.1),
            conv(4, 6, 1),
            nn.FeatureAlphaDropout(0.1),
            nn.ReLU(),
            nn.Dropout(0.1),
        ),
        (2, 0, 3),
    ),
]

PARTS = (2, 4, 6, 8)
MLP = [
    Block("repmlp_local_perceptron", mlp.LocalPerceptron, (0, 0, 3), (2, 4, 5, 6), (3, 4, 5, 6)),
    Block(
        "repmlp_local_perceptron_of_other_channels",
        lambda: mlp.LocalPerceptron(3, 4, 4, 4, 1, 3, 5),
        (0, 0, 3),
        (2, 3, 4, 4),
        (3, 3, 4, 4),
    ),
    Block("repmlp", mlp.RepMLP, (1, 0, 14), PARTS, (3, 4, 6, 8)),
    Block("repmlp_dense", lambda: mlp.RepMLP(4, 6, groups=1), (1, 0, 14), PARTS, (3, 4, 6, 8)),
    Block("repmlp_of_one_partition", lambda: mlp.RepMLP(part=(6, 8)), (1, 0, 3), PARTS, (3, 4, 6, 8)),
    Block("repmlp_without_convolutions", lambda: mlp.RepMLP(kernels=()), (1, 0, 14), PARTS, (3, 4, 6, 8)),
    Block("repmlpnet", mlp.RepMLPNetBlock, (3, 0, 13), (2, 8, 6, 8), (3, 8, 6, 8)),
    Block("repmlpnet_a_set_for_each_channel", lambda: mlp.RepMLPNetBlock(8, 8), (3, 0, 13), (2, 8, 6, 8), (3, 8, 6, 8)),
]

VARIANTS = [
    Block("acnet_5x5", lambda: axes.AsymmetricAnyD(2, kernel=5), ONE),
    Block("acnet_stride_2", lambda: axes.AsymmetricAnyD(2, stride=2), ONE),
    Block("acnet_depthwise", lambda: axes.AsymmetricAnyD(2, groups=4), ONE),
    Block("acnet_groups_2", lambda: axes.AsymmetricAnyD(2, groups=2), ONE),
    Block("acnet_1d", lambda: axes.AsymmetricAnyD(1), ONE, LINE, LINE_OTHER),
    Block("acnet_3d", lambda: axes.AsymmetricAnyD(3), ONE, CUBE, CUBE_OTHER),
    Block("repvgg_1d", lambda: axes.RepAnyD(1), ONE, LINE, LINE_OTHER),
    Block("repvgg_1d_stride_2", lambda: axes.RepAnyD(1, stride=2), ONE, LINE, LINE_OTHER),
    Block("repvgg_3d", lambda: axes.RepAnyD(3), ONE, CUBE, CUBE_OTHER),
    Block("repvgg_3d_depthwise", lambda: axes.RepAnyD(3, groups=4), ONE, CUBE, CUBE_OTHER),
    Block("diverse_branch_pool_1d", lambda: axes.PooledAnyD(1), ONE, LINE, LINE_OTHER),
    Block("diverse_branch_pool_3d", lambda: axes.PooledAnyD(3), ONE, CUBE, CUBE_OTHER),
    Block("repmixer_1d", axes.Mixer1d, ONE, LINE, LINE_OTHER),
    Block("low_rank_adapter_1d", lambda: _low_rank(nn.Conv1d), ONE, LINE, LINE_OTHER),
    Block("transposed_1d", sequence(nn.ConvTranspose1d(4, 6, 4, 2, 1), nn.BatchNorm1d(6)), ONE, LINE, LINE_OTHER),
    Block("transposed_3d", sequence(nn.ConvTranspose3d(4, 2, 2, 2), nn.BatchNorm3d(2)), ONE, CUBE, CUBE_OTHER),
    Block(
        "same_padding_even_and_odd_kernels_and_dilation",
        lambda: Formula(
            lambda p, x: p.bn(p.a(x) + p.b(x) - p.c(x)),
            a=nn.Conv2d(4, 4, (4, 3), padding="same"),
            b=nn.Conv2d(4, 4, (2, 3), padding="same", bias=False),
            c=nn.Conv2d(4, 4, (1, 3), padding="same"),
            bn=nn.BatchNorm2d(4),
        ),
        ONE,
    ),
    Block("repvgg_groups_2_wide", lambda: m.RepVGG(8, 8, groups=2), ONE, EIGHT, EIGHT_OTHER),
    Block("diverse_branch_depthwise", lambda: m.DiverseBranch(groups=4), ONE),
    Block("unireplknet_with_squeezed_norms", lambda: nn.Sequential(m.UniRepLK(), nn.BatchNorm2d(4)), ONE),
    Block("linear_on_channels_last_beside_pointwise", axes.ChannelsLast, ONE),
    Block("positional_conv_on_tokens", mobile.TokenPositionalConv, (1, 0, 5), (2, 30, 4), (3, 30, 4)),
    Block(
        "three_pointwise_concatenated_then_norm",
        lambda: Formula(
            lambda p, x: p.bn(torch.cat([p.a(x), p.b(x), p.c(x)], 1)),
            a=conv(4, 2, 1),
            b=conv(4, 3, 1),
            c=conv(4, 5, 1, bias=False),
            bn=nn.BatchNorm2d(10),
        ),
        ONE,
    ),
]


def _beside(left: nn.Module, right: nn.Module) -> nn.Module:
    return Formula(lambda p, x: p.left(x) + p.right(x), left=left, right=right)


def _low_rank(make: type[nn.Conv1d]) -> nn.Module:
    """LoRA on a convolution: k x k down to the rank, 1x1 up, scaled by alpha / rank."""
    return Formula(
        lambda p, x: p.base(x) + p.up(p.down(x)) * (16 / 2),
        base=make(4, 4, 3, padding=1),
        down=make(4, 2, 3, padding=1, bias=False),
        up=make(2, 4, 1, bias=False),
    )


@pytest.mark.parametrize("block", COMPUTED_WEIGHTS, ids=lambda block: block.name)
def test_weight_computed_from_parameters_becomes_one_constant(block: Block) -> None:
    assert_fuses(block)


@pytest.mark.parametrize("block", [*RESTORATION, *MOBILE, *MLP], ids=lambda block: block.name)
def test_published_block_becomes_the_stated_operators(block: Block) -> None:
    assert_fuses(block)


@pytest.mark.parametrize("block", VARIANTS, ids=lambda block: block.name)
def test_variant_over_other_axes_kernels_or_groups_becomes_one_convolution(block: Block) -> None:
    assert_fuses(block)


def test_distilled_heads_on_pooled_features_become_one_linear_layer() -> None:
    module = randomised(nn.Sequential(conv(4, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), m.TwoHeads()))
    found = fused(module, noise((2, 4, 7, 8)))
    linear = [node for node in found.program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(linear) == 1
    assert count_ops(found.program)["norms"] == 0
    assert difference(module, found.program, noise((3, 4, 7, 8), seed=1)) <= TOLERANCE
