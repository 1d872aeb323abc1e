"""A value with several readers goes into each of them, where that saves its computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repconv_cli.graph.fuse import Fused
from repconv_cli.graph.plan import count_ops
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import TOLERANCE, difference, fused, noise

SHAPE = (2, 4, 9, 9)


def checked(function: Any, shape: tuple[int, ...] = SHAPE, **parts: nn.Module) -> tuple[Fused, tuple[int, int, int]]:
    module = randomised(Formula(function, **parts))
    found = fused(module, noise(shape), is_spatial_free=False)
    assert difference(module, found.program, noise((3, *shape[1:]), seed=1)) <= TOLERANCE
    counts = count_ops(found.program)
    return found, (counts["convs"], counts["norms"], counts["ops"])


def branches(part: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = part.norm(x.relu())
    return part.a(y).relu(), part.b(y).sigmoid()


def test_a_norm_that_two_unpadded_convolutions_read_goes_into_both() -> None:
    found, counts = checked(branches, norm=nn.BatchNorm2d(4), a=conv(4, 4, 1), b=conv(4, 6, 3, padding=0))
    assert counts == (2, 0, 5)
    # What was computed before is told once.
    norm = next(node for node in found.plan.program.graph.nodes if "batch_norm" in str(node.target))
    assert [norm in block.freed for block in found.plan.blocks].count(True) == 1
    assert sum(block.before.ops - block.after.ops for block in found.plan.blocks) == 1


def test_a_norm_that_a_padded_convolution_reads_too_stays() -> None:
    _, counts = checked(branches, norm=nn.BatchNorm2d(4), a=conv(4, 4, 1), b=conv(4, 6, 3))
    assert counts == (2, 1, 6)


def test_a_norm_whose_value_is_also_given_stays() -> None:
    def forward(part: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = part.norm(x.relu())
        return part.a(y), y

    _, counts = checked(forward, norm=nn.BatchNorm2d(4), a=conv(4, 4, 1))
    assert counts == (1, 1, 3)


def test_query_key_and_value_take_the_norm_that_they_share() -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        y = part.norm(x.relu().flatten(0, 1)).reshape_as(x)
        weights = torch.softmax(part.query(y) @ part.key(y).transpose(1, 2), -1)
        return weights @ part.value(y)

    layers = {name: nn.Linear(4, 4) for name in ("query", "key", "value")}
    _, counts = checked(forward, (2, 7, 4), norm=nn.BatchNorm1d(4), **layers)
    # relu, three linear layers, a transpose, two products, softmax
    assert counts == (0, 0, 8)


def test_a_dear_layer_is_not_computed_twice() -> None:
    _, counts = checked(branches, norm=conv(4, 4, 3, padding=0), a=conv(4, 4, 1), b=conv(4, 4, 1))
    assert counts == (3, 0, 6)


def test_a_fused_block_is_taken_further() -> None:
    def forward(part: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = part.norm(x.relu()) * 2
        return part.norm_a(part.a(y)), part.b(y)

    found, counts = checked(
        forward, norm=nn.BatchNorm2d(4), a=conv(4, 4, 1), norm_a=nn.BatchNorm2d(4), b=conv(4, 6, 3, padding=0)
    )
    assert counts == (2, 0, 3)
    assert sum(block.before.ops - block.after.ops for block in found.plan.blocks) == 3
