"""One fully connected layer for what stands around it: convolutions, norms and moves over all values of a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.row_matrix import keeps_order
from repconv_cli.graph.unroll import Rows, Work, _through
from tests.graph import models_mlp as mlp
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise
from tests.graph.refusal_case import Refused, assert_refused, formula, sequence

IMAGE = (2, 4, 4, 5)


@dataclass(frozen=True)
class Classifier:
    """A model, the shape of the weight that it comes down to, and the operations that stay."""

    name: str
    make: Callable[[], nn.Module]
    weight: tuple[int, ...]
    ops: int
    shape: tuple[int, ...] = IMAGE


def head(inputs: int, *before: nn.Module) -> Callable[[], nn.Module]:
    return sequence(*before, nn.Flatten(), nn.Linear(inputs, 5))


FUSED = [
    Classifier("norm", head(80, nn.BatchNorm2d(4)), (5, 80), 2),
    Classifier("convolution", head(120, conv(4, 6)), (5, 80), 2),
    Classifier("convolution_and_norm_with_stride", head(36, conv_bn(4, 6, stride=2)), (5, 80), 2),
    Classifier("two_padded_biased_convolutions", head(40, conv(4, 6), conv(6, 2)), (5, 80), 2),
    Classifier("reflected_border", head(120, conv(4, 6, padding_mode="reflect")), (5, 80), 2),
    Classifier("transposed_convolution", head(126, nn.ConvTranspose2d(4, 2, 3, 2, 1)), (5, 80), 2),
    Classifier("depthwise_over_time", head(24, nn.Conv1d(4, 4, 3, groups=4)), (5, 32), 2, (2, 4, 8)),
    Classifier("volume", head(32, nn.BatchNorm3d(4), nn.Conv3d(4, 4, (1, 3, 2))), (5, 96), 2, (2, 4, 2, 4, 3)),
    Classifier(
        "average_of_each_quarter_after_a_convolution",
        head(16, conv(4, 4, 5), nn.AvgPool2d(2)),
        (5, 64),
        2,
        (2, 4, 4, 4),
    ),
    Classifier(
        "channels_last_before_it_is_flattened",
        formula(lambda p, x: p.fc(p.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=conv(4, 6), fc=nn.Linear(120, 5)),
        (5, 80),
        2,
    ),
    Classifier(
        "branches_side_by_side_and_a_part_of_the_channels",
        formula(
            lambda p, x: p.fc(torch.cat([p.a(x), p.b(x[:, 1:3]), 2 * x], 1).flatten(1)),
            a=conv(4, 2, 5),
            b=conv(2, 4),
            fc=nn.Linear(200, 5),
        ),
        (5, 80),
        2,
    ),
    Classifier(
        "two_layers_in_a_row",
        formula(
            lambda p, x: p.b(p.norm(p.a(x.flatten(1)))), a=nn.Linear(80, 9), norm=nn.BatchNorm1d(9), b=nn.Linear(9, 5)
        ),
        (5, 80),
        2,
    ),
    Classifier(
        "tokens_then_all_of_them",
        formula(
            lambda p, x: p.b(p.norm(p.a(x)).flatten(1)), a=nn.Linear(4, 6), norm=nn.BatchNorm1d(7), b=nn.Linear(42, 3)
        ),
        (3, 28),
        2,
        (2, 7, 4),
    ),
    Classifier(
        "a_convolution_after_it",
        formula(lambda p, x: p.conv(p.fc(x.flatten(1)).reshape(-1, 4, 4, 5)), fc=nn.Linear(80, 80), conv=conv(4, 4, 3)),
        (80, 80),
        3,
    ),
    Classifier(
        "beside_what_reads_a_row_and_what_does_not",
        formula(
            lambda p, x: (p.full(x.flatten(1)) * 0.5).reshape(-1, 4, 4, 5) + p.norm(p.a(x)) - p.b(p.c(x)) + 2 * x,
            full=nn.Linear(80, 80),
            a=conv(4, 4, 3, groups=2),
            norm=nn.BatchNorm2d(4),
            b=conv(6, 4, 1),
            c=conv(4, 6, 3, bias=False),
        ),
        (80, 80),
        3,
    ),
    Classifier(
        "with_a_layer_that_is_mixed_afterwards",
        formula(
            lambda p, x: p.full(x.flatten(1)) + p.b(p.a(x)).flatten(1) + p.pool(x).flatten(1),
            full=nn.Linear(80, 80),
            a=conv(4, 4, 3),
            b=conv(4, 4, 3, groups=4),
            pool=nn.AvgPool2d(3, 1, 1),
        ),
        (80, 80),
        2,
    ),
]


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.name)
def test_what_stands_before_a_classifier_goes_into_it(case: Classifier) -> None:
    module = randomised(case.make())
    found = fused(module, noise(case.shape), is_spatial_free=False)
    counts = count_ops(found.program)
    assert (counts["convs"], counts["norms"], counts["ops"]) == (0, 0, case.ops), found.program.graph
    assert case.weight in {tuple(tensor.shape) for tensor in found.program.tensors.values()}
    assert len(found.certificates) == len(found.plan.blocks) == 1
    for batch in (1, 3):
        assert difference(module, found.program, noise((batch, *case.shape[1:]), seed=batch)) <= TOLERANCE


def flat_sum(outputs: int = 4, part: str = "x") -> Callable[[Any, Tensor], Tensor]:
    """Return ``fc(flatten(x)) + conv(x)``, one of the two reading an activation of ``x``."""

    def run(p: Any, x: Tensor) -> Tensor:
        full = x.relu() if part == "full" else x
        local = x.relu() if part == "conv" else x
        y: Tensor = p.full(full.flatten(1)).reshape(-1, outputs, 4, 5) + p.conv(local)
        return y

    return run


LEFT = [
    Refused(
        "activation_before_the_full_layer_alone",
        formula(flat_sum(part="full"), full=nn.Linear(80, 80), conv=conv_bn(4, 4)),
        r"the branches have no common linear source: .*relu.* between",
        (1, 0, 6),
        IMAGE,
    ),
    Refused(
        "activation_before_the_convolution_alone",
        formula(flat_sum(part="conv"), full=nn.Linear(80, 80), conv=conv_bn(4, 4)),
        r"the branches have no common linear source: .*relu.* between",
        (1, 0, 6),
        IMAGE,
    ),
    Refused(
        "wide_layer_on_a_narrow_image",
        sequence(conv(8, 1, 1), nn.Flatten(), nn.Linear(20, 16)),
        r"exact as one linear layer, but 5\.33 times the work \(480 → 2,560 MACs\)",
        (1, 0, 3),
        (2, 8, 4, 5),
    ),
    Refused(
        "grouped_layer_beside_a_dense_convolution",
        formula(
            lambda p, x: p.full(x.reshape(-1, 80, 1, 1)).reshape(-1, 4, 4, 5) + p.conv(x),
            full=nn.Conv2d(80, 80, 1, groups=4),
            conv=conv(4, 4, 1),
        ),
        r"exact as one linear layer, but 3\.33 times the work \(1,920 → 6,400 MACs\)",
        (2, 0, 5),
        IMAGE,
    ),
    Refused(
        "low_rank_layer_beside_a_convolution",
        formula(
            lambda p, x: p.up(p.down(x.flatten(1))).reshape(-1, 4, 4, 5) + p.conv(x),
            down=nn.Linear(80, 2),
            up=nn.Linear(2, 80),
            conv=conv(4, 4, 1),
        ),
        r"exact as one linear layer, but 10 times the work \(640 → 6,400 MACs\)",
        (1, 0, 6),
        IMAGE,
    ),
]


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case.name)
def test_near_miss_is_left_with_its_reason_and_computes_the_same(case: Refused) -> None:
    assert_refused(case)


def test_a_plain_classifier_is_neither_fused_nor_refused() -> None:
    for before in (nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2)):
        flat = nn.Sequential(conv(4, 4), nn.ReLU(), before, nn.Flatten())
        inputs = flat(torch.zeros(IMAGE)).shape[1]
        found = fused(randomised(nn.Sequential(flat, nn.Linear(inputs, 5))), noise(IMAGE), is_spatial_free=False)
        assert (found.plan.blocks, found.plan.refusals) == ((), ())


def test_samples_that_are_mixed_are_no_rows() -> None:
    """A partition of the batch, not of the sample: each row would hold values of two samples."""
    module = randomised(
        Formula(
            lambda p, x: p.fc(p.conv(x).permute(1, 0, 2, 3).reshape(4, -1, 20).flatten(0, 1)).relu(),
            conv=conv(4, 4),
            fc=nn.Linear(20, 5),
        )
    )
    found = fused(module, noise(IMAGE), is_spatial_free=False)
    assert count_ops(found.program)["convs"] == 1
    assert difference(module, found.program, noise((3, 4, 4, 5), seed=1)) <= TOLERANCE


def test_the_layer_keeps_its_name_and_shape_where_its_author_gives_it_both() -> None:
    for module, shape in ((mlp.RepMLP(), (48, 24, 1, 1)), (mlp.RepMLPNetBlock(), (24, 12, 1, 1))):
        example = (2, *((4,) if isinstance(module, mlp.RepMLP) else (8,)), 6, 8)
        found = fused(randomised(module), noise(example), is_spatial_free=False)
        assert tuple(found.program.tensors["fc3.weight"].shape) == shape
        assert found.plan.blocks[0].target == "fc3"


def test_moving_axes_of_size_one_keeps_the_order() -> None:
    def moved(*order: int, free: bool = False) -> bool:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta = {"shape": (2, 1, 4, 5), "free": (True, free, False, False)}
        return keeps_order(graph.call_function(torch.ops.aten.permute.default, (x, list(order))))

    assert moved(0, 2, 1, 3)
    assert moved(1, 0, 2, -1)
    assert not moved(0, 2, 1, 3, free=True)
    assert not moved(0, 1, 3, 2)


def test_rows_of_a_norm_are_as_many_groups_as_values() -> None:
    norm, depthwise, dense = Work((12,), 12, 12), Work((12,), 12, 4), Work((12,), 6, 1, is_layer=True, axes=0)
    start = Rows()
    assert _through(norm, [start]) == Rows(12, 12, 12)
    assert _through(depthwise, [Rows(12, 12, 12)]) == Rows(12, 12, 4)
    assert _through(dense, [Rows(12, 12, 4)]) == Rows(12, 6, 1, 1, 0)


def test_rows_that_a_longer_one_holds_become_blocks_of_it_and_others_are_cut() -> None:
    tokens = Rows(4, 6, 1, 1, 0)
    assert _through(Work((18,), 18, 3), [tokens]) == Rows(12, 18, 3, 1, None)
    assert _through(Work((9,), 9, 1), [tokens]) is None
    assert _through(Work((1, 1)), [tokens, Rows(8, 12, 4, 2)]) == Rows(8, 12, 2, 3, None)
    assert _through(Work((1, 1)), [tokens, Rows(4, 4)]) is None
