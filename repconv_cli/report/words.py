"""Figures and texts as people read them."""

from __future__ import annotations


def plain(text: str) -> str:
    """Return ``text`` without characters that a terminal would interpret."""
    return "".join(c if c.isprintable() else "�" for c in text)


def size_of(size: int | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    if size is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
