"""Whose file it is, by the names of its tensors. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import cache

from repconv_cli.checkpoint.families.parts import Family, Part, leaves
from repconv_cli.checkpoint.families.table import FAMILIES

# Words that networks of all kinds have in their names.
_COMMON = {
    "conv", "conv1", "conv2", "bn", "norm", "norm1", "norm2", "c", "l", "m", "head", "linear", "module", "mlp", "fc1",
    "act", "gamma", "beta", "identity", "layer_scale", "mixer", "alpha",
}  # fmt: skip


def family_of(names: Iterable[str]) -> Family | None:
    """Return the family whose marks ``names`` bear, in training or in deploy form; None for an unknown one."""
    known = list(names)
    for form in ("marks", "fused"):
        for family in FAMILIES:
            marks = getattr(family, form)
            if marks and all(_has(known, mark) for mark in marks) and all(map(_pattern(family.every), known)):
                return family
    return None


def nearest_family(names: Iterable[str]) -> Family | None:
    """Return the family whose blocks have most of their own words in ``names``; None where none has any."""
    words = {word for name in names for word in name.split(".")}

    def share(family: Family) -> float:
        own = {word for row in family.rows for leaf in leaves(row.part) for word in _words(leaf)} - _COMMON
        return len(own & words) / max(len(own), 1)

    best = max(FAMILIES, key=share)
    return best if share(best) else None


@cache
def _pattern(alternatives: str) -> Callable[[str], object]:
    return re.compile("|".join(f"(?:{translate(pattern)})" for pattern in alternatives.split("|"))).match


def _has(names: list[str], mark: str) -> bool:
    matches = _pattern(mark)
    return any(matches(name) for name in names)


def _words(leaf: Part) -> list[str]:
    path = getattr(leaf, "path", getattr(leaf, "key", ""))
    return [word for word in path.split(".") if word and "*" not in word and not word.isdigit()]
