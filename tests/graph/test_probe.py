"""Linear operators that no rule knows: the kernel is read off the Jacobian, or the block is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repconv_cli.algebra import Axis
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.probe import probe
from repconv_cli.graph.trace import trace
from tests.graph.block_case import assert_leaves
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise
from tests.graph.refusal_case import formula

SHAPE = (2, 4, 8, 8)
STATIC = ((True, False, False, False),)


@dataclass(frozen=True)
class Probed:
    """A model of operators without a rule, and the (convolutions, norms, operations) that stay."""

    name: str
    make: Callable[[], nn.Module]
    left: tuple[int, int, int]
    shape: tuple[int, ...] = SHAPE
    is_spatial_free: bool = False


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    parts = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    return parts.transpose(1, 2).reshape(x.shape)


PROBED = [
    Probed(
        "stacked_and_summed",
        formula(lambda p, x: torch.stack([p.a(x), p.b(x), x]).sum(0), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1)),
        (1, 0, 1),
    ),
    Probed(
        "stacked_and_summed_at_any_size",
        formula(lambda p, x: torch.stack([p.a(x), p.b(x)], -1).mean(-1), a=conv_bn(4, 4, 3), b=conv_bn(4, 4, 1)),
        (1, 0, 1),
        is_spatial_free=True,
    ),
    Probed(
        "shuffled_channels",
        formula(
            lambda p, x: p.b(shuffled(p.a(x))).relu(),
            a=conv(4, 4, 3, groups=4, bias=False),
            b=conv(4, 4, 1, groups=1),
        ),
        (2, 0, 3),
    ),
    Probed(
        "norm_after_a_shuffle",
        formula(lambda p, x: p.norm(shuffled(p.a(x))).relu(), a=conv(4, 4, 3), norm=nn.BatchNorm2d(4)),
        (1, 0, 2),
    ),
    Probed(
        "pixels_to_channels_then_a_pointwise",
        formula(lambda p, x: p.a(functional.pixel_unshuffle(x, 2)), a=conv(16, 3, 1)),
        (1, 0, 1),
    ),
    Probed(
        "patches_by_unfold",
        formula(
            lambda p, x: (p.w @ functional.unfold(x, 3, padding=1)).reshape(x.shape[0], 4, 8, 8) + p.a(x),
            w=torch.zeros(4, 36),
            a=conv(4, 4, 1),
        ),
        (1, 0, 1),
    ),
    Probed(
        "every_other_channel",
        formula(lambda p, x: p.norm(p.a(x)[:, ::2]).relu(), a=conv(4, 4, 3), norm=nn.BatchNorm2d(2)),
        (1, 0, 2),
    ),
    Probed(
        "product_with_a_matrix",
        formula(
            lambda p, x: torch.einsum("bchw,oc->bohw", p.a(x), p.w).relu(),
            a=conv(4, 8, 1),
            w=torch.zeros(4, 8),
        ),
        (1, 0, 2),
    ),
    Probed(
        "product_with_a_matrix_on_features",
        formula(lambda p, x: p.a(x @ p.w).relu(), w=torch.zeros(8, 4), a=nn.Linear(4, 3)),
        (0, 0, 2),
        (2, 8),
    ),
    Probed(
        "product_with_a_matrix_on_tokens",
        formula(lambda p, x: p.a(x @ p.w).relu(), w=torch.zeros(8, 4), a=nn.Linear(4, 3)),
        (0, 0, 2),
        (2, 5, 8),
    ),
]


@pytest.mark.parametrize("case", PROBED, ids=lambda case: case.name)
def test_operators_without_a_rule_are_fused_from_their_jacobian(case: Probed) -> None:
    other = (3, 4, 11, 10) if case.is_spatial_free else (3, *case.shape[1:])
    assert_leaves(case.make, case.left, case.shape, other, is_spatial_free=case.is_spatial_free)


@pytest.mark.parametrize("case", PROBED[:2], ids=lambda case: case.name)
def test_a_large_layer_has_a_jacobian_too(case: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 5)
    monkeypatch.setattr("repconv_cli.graph.interpret._FEWEST_ROWS", 1)
    assert_leaves(case.make, case.left, case.shape, (3, *case.shape[1:]), is_spatial_free=case.is_spatial_free)


KEPT = [
    Probed(
        "rows_reversed",
        formula(lambda p, x: p.a(x).flip(2) + p.b(x), a=conv(4, 4, 3), b=conv(4, 4, 1)),
        (2, 0, 4),
    ),
    Probed(
        "running_sum_along_a_row",
        formula(lambda p, x: p.a(x).cumsum(3) + p.b(x), a=conv(4, 4, 3), b=conv(4, 4, 1)),
        (2, 0, 4),
    ),
    Probed(
        "samples_mixed",
        formula(lambda p, x: p.a(x).flip(0) + p.b(x), a=conv(4, 4, 3), b=conv(4, 4, 1)),
        (2, 0, 4),
    ),
    Probed(
        "smaller_and_larger_again",
        formula(
            lambda p, x: functional.interpolate(p.a(x), scale_factor=2.0) + p.b(x),
            a=conv(4, 4, 2, stride=2, padding=0),
            b=conv(4, 4, 1),
        ),
        (2, 0, 4),
    ),
    Probed(
        "product_of_two_values",
        formula(lambda p, x: torch.stack([p.a(x) * x, p.b(x)]).sum(0), a=conv(4, 4, 3), b=conv(4, 4, 1)),
        (2, 0, 5),
    ),
]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: case.name)
def test_linear_operators_that_are_no_convolution_stay(case: Probed) -> None:
    assert_leaves(case.make, case.left, case.shape, (2, *case.shape[1:]))


def test_a_mean_over_a_free_size_is_no_kernel() -> None:
    """At the traced size it is one; at any other it would be wrong."""
    module = randomised(
        Formula(lambda p, x: p.norm(p.conv(x).mean(2, keepdim=True)), conv=conv(4, 4, 1), norm=nn.BatchNorm2d(4))
    )
    found = fused(module, noise(SHAPE))
    assert difference(module, found.program, noise((3, 4, 13, 10), seed=1)) <= TOLERANCE


LAYERS = [
    conv(4, 6, 3),
    conv(4, 6, 3, stride=2),
    conv(4, 6, 3, stride=3, padding=0),
    conv(4, 6, (3, 1), padding=(1, 0)),
    conv(4, 6, 3, dilation=2),
    conv(4, 6, 2, padding=1),
    conv(4, 6, 1, stride=2),
    conv(4, 8, 3, groups=4),
    conv(4, 8, 3, groups=2),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, 1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_known_layer_is_found_again(layer: nn.Module) -> None:
    """The oracle: probing a convolution gives its own weight, bias and geometry."""
    layer = randomised(layer)
    program = trace(layer, noise((2, 4, 11, 11)), may_vary=STATIC)
    constants = Constants(program)
    anchor, end = program.placeholders()[0], program.output_nodes()[0]
    found = probe(anchor, region_between(anchor, end, constants), constants, 1)
    if isinstance(layer, nn.Conv2d):
        assert torch.equal(found.weight, layer.weight.detach().double())
        assert found.bias.tolist() == layer.bias.detach().double().tolist()
        assert (found.stride, found.dilation, found.groups) == (layer.stride, layer.dilation, layer.groups)
        assert tuple(axis.low for axis in found.geometry.axes) == layer.padding
    else:
        assert found.groups == 4
    x = noise((3, 4, 11, 11), seed=3)[0].double()
    assert torch.allclose(found(x), layer.double()(x), rtol=1e-12, atol=1e-12)


def test_a_kernel_that_reads_one_tap_less_in_one_channel_is_found_whole() -> None:
    layer = randomised(conv(4, 6, 3))
    with torch.no_grad():
        layer.weight[:, :, 0] = 0.0  # type: ignore[index]
        layer.weight[3, 2, 0, 1] = 1.0  # type: ignore[index]
    program = trace(layer, noise((2, 4, 9, 9)), may_vary=STATIC)
    constants = Constants(program)
    anchor, end = program.placeholders()[0], program.output_nodes()[0]
    found = probe(anchor, region_between(anchor, end, constants), constants, 1)
    assert list(found.geometry.axes) == [Axis(3, 1, 1, 1, 1)] * 2
