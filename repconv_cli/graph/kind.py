"""A block in the field's words: ``3×3 + 1×1 + identity``, ``4 × 3×3 depthwise + identity``."""

from __future__ import annotations

import re
from collections import Counter
from math import prod

from torch import fx

from repconv_cli.graph.rules import Step

# A chain longer than this tells a reader nothing.
_LONGEST = 80


def branches_of(node: fx.Node, anchor: fx.Node, steps: dict[fx.Node, Step]) -> Counter[str]:
    """Return the branches that ``node`` sums, each as its chain of kernels from the anchor on, and how many of each.

    What follows the sum (a norm, a scale) belongs to no branch; ``node`` itself may be the whole of one branch.
    Every node is visited once, with the chains that lead from it to ``node``: ``y + y`` again and again has
    exponentially many branches and few chains.
    """
    return _branches(node, anchor, steps, {})


def _branches(node: fx.Node, anchor: fx.Node, steps: dict[fx.Node, Step], known: dict[fx.Node, str]) -> Counter[str]:
    found: Counter[str] = Counter()
    chains = {node: Counter({"": 1})}
    while chains:
        current = max(chains)
        suffixes = chains.pop(current)
        if current is anchor:
            found.update({suffix or "identity": count for suffix, count in suffixes.items()})
            continue
        step = steps[current]
        label = _label(step)
        for suffix, count in suffixes.items():
            chain = _shortened("→".join(part for part in (label, suffix) if part))
            if len(step.inputs) > 1 and chain and suffix:
                if current not in known:
                    parts = (_branches(source, anchor, steps, known) for source in step.inputs)
                    known[current] = _shortened(_counted(sum(parts, Counter())))
                found[_shortened(f"({known[current]})→{suffix}")] += count
                continue
            for source in step.inputs:
                chains.setdefault(source, Counter())[chain] += count
    return found


def listed(branches: Counter[str]) -> tuple[str, ...]:
    """Return ``("2 × 3×3", "identity")``: the largest kernel first, the identity last."""
    ordered = sorted(branches, key=_rank, reverse=True)
    return tuple(branch if branches[branch] == 1 else f"{branches[branch]} × {branch}" for branch in ordered)


def _counted(branches: Counter[str]) -> str:
    return " + ".join(listed(branches))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else "…"


def _label(step: Step) -> str:
    if step.leaf is None or not step.label:
        return step.label
    geometry = step.leaf.geometry
    is_depthwise = geometry.groups == geometry.in_channels > 1
    return f"{step.label} depthwise" if is_depthwise and not step.label.startswith("average") else step.label


def _rank(branch: str) -> tuple[bool, int]:
    """Order by kernel area, the identity last."""
    areas = [prod(map(int, kernel.split("×"))) for kernel in re.findall(r"\d+(?:×\d+)+", branch)]
    return branch != "identity", max(areas, default=1)


def kind_of(branches: Counter[str]) -> str:
    """Return a block's kind: equal branches counted, the largest kernel first, the identity last."""
    joined = _counted(branches)
    if branches.total() == 1:
        return "scale" if joined == "identity" else joined
    if all(branch.endswith(" depthwise") or branch == "identity" for branch in branches):
        return joined.replace(" depthwise", "") + " depthwise"
    return joined
