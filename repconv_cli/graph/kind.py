"""A block in the field's words: ``3×3 + 1×1 + identity``, ``4 × 3×3 depthwise + identity``."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from torch import fx

from repconv_cli.graph.rules import Step


def branches_of(node: fx.Node, anchor: fx.Node, steps: dict[fx.Node, Step]) -> tuple[str, ...]:
    """Return the branches that ``node`` sums, each as its chain of kernels from the anchor on.

    What follows the sum (a norm, a scale) belongs to no branch; ``node`` itself may be the whole of one branch.
    """
    branches: list[str] = []
    pending = [(node, "")]
    while pending:
        current, suffix = pending.pop(0)
        if current is anchor:
            branches.append(suffix or "identity")
            continue
        step = steps[current]
        label = _label(step)
        chain = "→".join(part for part in (label, suffix) if part)
        if len(step.inputs) > 1 and chain and suffix:
            branches.append(f"({' + '.join(_inner(step, anchor, steps))})→{suffix}")
        else:
            pending.extend((source, chain) for source in step.inputs)
    return tuple(branches)


def _inner(step: Step, anchor: fx.Node, steps: dict[fx.Node, Step]) -> list[str]:
    return [branch for source in step.inputs for branch in branches_of(source, anchor, steps)]


def _label(step: Step) -> str:
    if step.leaf is None:
        return step.label
    geometry = step.leaf.geometry
    is_depthwise = geometry.groups == geometry.in_channels > 1
    return f"{step.label} depthwise" if is_depthwise and not step.label.startswith("average") else step.label


def _rank(branch: str) -> tuple[bool, int]:
    """Order by kernel area, the identity last."""
    areas = [prod(map(int, kernel.split("×"))) for kernel in re.findall(r"\d+(?:×\d+)+", branch)]
    return branch != "identity", max(areas, default=1)


def kind_of(node: fx.Node, anchor: fx.Node, steps: dict[fx.Node, Step]) -> str:
    """Return the block's kind: equal branches counted, the largest kernel first, the identity last."""
    branches = branches_of(node, anchor, steps)
    counts = Counter(sorted(branches, key=_rank, reverse=True))
    parts = [branch if count == 1 else f"{count} × {branch}" for branch, count in counts.items()]
    joined = " + ".join(parts)
    if len(branches) == 1:
        return "scale" if joined == "identity" else joined
    if all(branch.endswith(" depthwise") or branch == "identity" for branch in branches):
        return joined.replace(" depthwise", "") + " depthwise"
    return joined
