"""A chain of linear operators costs linear work: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from repconv_cli.graph import analyse as analysis_room
from repconv_cli.graph import select as selection_room
from repconv_cli.graph.analyse import MAX_ANCHORS, analyse
from repconv_cli.graph.kind import branches_of, listed
from repconv_cli.graph.program import LEAF, InputInfo, Program, Structure
from repconv_cli.graph.select import Ledger, select

aten = torch.ops.aten
SHAPE = (2, 2, 6, 6)


def chain(length: int, kind: str) -> Program:
    """Return a graph of ``length`` linear operators in a row, made by hand: tracing one would cost minutes."""
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {"weight": torch.randn(2, 2, 1, 1), "scale": torch.randn(2, 1, 1)}

    def described(node: fx.Node, shape: tuple[int, ...] = SHAPE) -> fx.Node:
        free = (True, False, True, True) if len(shape) == 4 and node.op != "get_attr" else (False,) * len(shape)
        node.meta = {"module": "", "shape": shape, "free": free, "dtype": torch.float32}
        return node

    x = described(graph.placeholder("x"))
    weight, scale = (described(graph.get_attr(key), tuple(tensors[key].shape)) for key in tensors)
    makers: dict[str, Any] = {
        "convolutions": lambda y: graph.call_function(aten.conv2d.default, (y, weight)),
        "doubled sums": lambda y: graph.call_function(aten.add.Tensor, (y, y)),
        "residual sums": lambda y: graph.call_function(
            aten.add.Tensor, (described(graph.call_function(aten.mul.Tensor, (y, scale))), y)
        ),
    }
    y = x
    for _ in range(length if kind != "residual sums" else length // 2):
        y = described(makers[kind](y))
    graph.output((y,))
    info = InputInfo("x", (None, 2, None, None), SHAPE, torch.float32)
    return Program(graph, tensors, frozenset(tensors), (info,), Structure("tuple", (LEAF,)), Structure("dict"), LEAF)


def work(length: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return how many candidates were made, how many terms combined, and how many nodes the selection walked over."""
    counts = {"candidates": 0, "costs": 0, "walked": 0}
    cost_of_term, freed_by = analysis_room._cost_of_term, Ledger.freed_by

    def counted_cost(*args: Any) -> Any:
        counts["costs"] += 1
        return cost_of_term(*args)

    def counted_freed(self: Ledger, *args: Any) -> list[fx.Node]:
        freed = freed_by(self, *args)
        counts["walked"] += 1 + len(freed)
        return freed

    program = chain(length, kind)
    with monkeypatch.context() as patch:
        patch.setattr(analysis_room, "_cost_of_term", counted_cost)
        patch.setattr(selection_room.Ledger, "freed_by", counted_freed)
        found = analyse(program)
        counts["candidates"] = sum(len(candidates) for candidates in found.candidates.values())
        assert max(len(candidates) for candidates in found.candidates.values()) <= MAX_ANCHORS
        assert select(program, found)
    return counts


@pytest.mark.parametrize("kind", ["convolutions", "doubled sums", "residual sums"])
def test_work_grows_no_faster_than_the_chain(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short, middle, long = (work(length, kind, monkeypatch) for length in (100, 400, 1600))
    for name, count in short.items():
        assert count > 0
        # A fixed start (the first nodes have fewer anchors) may make the short chain cheaper than its share.
        assert middle[name] <= 4 * count * 1.25, name
        assert long[name] <= 4 * middle[name] * 1.1, name


def test_branches_are_counted_not_written_out():
    program = chain(40, "doubled sums")
    analysis = analyse(program)
    nodes = list(program.graph.nodes)
    anchor = next(node for node in nodes if node.op == "placeholder")
    last = next(iter(nodes[-1].all_input_nodes))
    branches = branches_of(last, anchor, analysis.steps)
    assert branches == {"identity": 2**40}
    assert listed(branches) == (f"{2**40} × identity",)
