"""Names taken from a file, made fit to be shown in one line of a terminal."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_SHOWN = 80
"""Characters of a name that are shown; the rest is replaced by its length."""

MOST_LISTED = 10
"""Names in a list that are shown; the rest is replaced by a count."""


def quoted(text: object, limit: int = LONGEST_SHOWN) -> str:
    r"""Return ``text`` without control characters and not longer than about ``limit`` characters.

    Everything Python calls unprintable is escaped, which covers terminal escapes, line breaks,
    text-direction overrides and lone surrogates.

    >>> quoted("conv\x1b[31m.weight")
    'conv\\x1b[31m.weight'
    >>> quoted("a" * 200, limit=10)
    'aaaaaaaaaa… (200 characters)'
    """
    full = str(text)
    cut = full[:limit]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
    return plain if len(full) <= limit else f"{plain}… ({len(full)} characters)"


def listed(names: Iterable[object], most: int = MOST_LISTED, limit: int = LONGEST_SHOWN) -> str:
    """Return ``names`` quoted and joined by commas, at most ``most`` of them and a count of the others.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    every = list(names)
    shown = ", ".join(quoted(name, limit) for name in every[:most])
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"
