"""Heads that torch ties to sizes by how memory lies: they are free from a size on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import repconv_cli
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import noise


def decoded(p: Any, x: Tensor) -> Tensor:
    """Return boxes of anchors by cells, as YOLO's heads do."""
    found = []
    for layer, head in ((p.first, p.one), (p.second, p.other)):
        x = layer(x).relu()
        y = head(x)
        y = y.view(y.shape[0], 3, 2, y.shape[2], y.shape[3]).permute(0, 1, 3, 4, 2).contiguous()
        found.append(y.sigmoid().reshape(y.shape[0], -1, 2))
    return torch.cat(found, 1)


def scored(p: Any, x: Tensor) -> Tensor:
    """Return scores of default boxes, as SSD's heads do."""
    found = []
    for layer, head in ((p.first, p.one), (p.second, p.other)):
        x = layer(x).relu()
        found.append(head(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1))
    return torch.cat(found, 1).view(x.shape[0], -1, 2).softmax(-1)


def by_frames(p: Any, x: Tensor) -> Tensor:
    """Return what frames give one by one, put together again: (batch, frames, channels, height, width)."""
    y = p.second(p.first(x.flatten(0, 1)).relu()).relu()
    y = y.view(x.shape[0], x.shape[1], *y.shape[1:]).transpose(1, 2)
    return p.head(y.mean((3, 4)).transpose(1, 2))  # type: ignore[no-any-return]


CASES: list[tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], list[tuple[int, ...]]]] = [
    (decoded, (2, 4, 48, 48), [(1, 4, 65, 80), (5, 4, 40, 96)]),
    (scored, (2, 4, 48, 48), [(1, 4, 65, 75), (5, 4, 40, 96)]),
    (by_frames, (2, 3, 4, 24, 24), [(1, 3, 4, 30, 33), (3, 3, 4, 24, 41)]),
]


@pytest.mark.parametrize(("forward", "shape", "others"), CASES)
def test_a_head_that_puts_its_map_in_order_runs_at_other_sizes(
    forward: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], others: list[tuple[int, ...]], tmp_path: Path
) -> None:
    parts = {"first": conv_bn(4, 4, stride=2), "second": conv_bn(4, 4, stride=2)}
    parts |= {"one": conv(4, 6, 1), "other": conv(4, 6, 1), "head": nn.Linear(4, 3)}
    module = randomised(Formula(forward, **parts)).eval()
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors", input=shape)
    assert {"first.0", "second.0"} <= {block.name for block in result.blocks}
    assert [note for note in result.notes if "fixed" in note] == []
    model = repconv_cli.load(tmp_path / "out.safetensors")
    for other in (shape, *others):
        x = noise(other)[0]
        with torch.no_grad():
            torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-4)
