"""What a page shows of a plan, as plain data: graphs, kernels branch by branch, ranges. Made only when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from repconv_cli.drawing.graphs import nodes_after, nodes_before
from repconv_cli.drawing.kernels import picture_of
from repconv_cli.facts import block_facts
from repconv_cli.graph.plan import Plan
from repconv_cli.results import Drawing, Result

__all__ = ["draw", "picture_of", "with_drawing"]

Progress = Callable[[str, int, int], None]


def with_drawing(result: Result, plan: Plan, progress: Progress | None) -> Result:
    """Return ``result`` with what a page shows of ``plan``."""
    return replace(result, drawing=draw(plan, progress))


def draw(plan: Plan, progress: Progress | None = None) -> Drawing:
    """Return the graphs of ``plan`` and a picture of each of its blocks; each kernel is computed, one at a time."""
    pictures = []
    for index, block in enumerate(plan.blocks):
        if progress is not None:
            progress(f"Drawing {block.name}", index, len(plan.blocks))
        pictures.append(picture_of(block, plan))
        plan.analysis.constants.forget()
    return Drawing(
        nodes_before(plan), nodes_after(plan), tuple(block_facts(block) for block in plan.blocks), tuple(pictures)
    )
