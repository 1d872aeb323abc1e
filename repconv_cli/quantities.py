"""Sizes and ages in words."""

from __future__ import annotations

_SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_AGES = (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1))


def size_of(count: int | None) -> str:
    """Return a number of bytes as ``33.2 MB``, a dash for what is not known."""
    if count is None:
        return "–"
    for unit, scale in _SIZES:
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def age_of(seconds: float) -> str:
    """Return how long ago something was, in its largest unit.

    >>> age_of(130), age_of(86_400), age_of(0.2)
    ('2 minutes old', '1 day old', 'just made')
    """
    for unit, length in _AGES:
        count = int(seconds // length)
        if count >= 1:
            return f"{count:,} {unit}{'' if count == 1 else 's'} old"
    return "just made"
