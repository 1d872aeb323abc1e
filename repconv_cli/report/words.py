"""Figures and names in words: sizes, changes, shapes, lines that break between words. Plain data in, text out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from repconv_cli.results import Change, InputFacts

_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))
# A name may be cut after these, and nowhere else.
_JOINTS = re.compile(r"(?<=[./_,:=\\-])")


def plain(text: str) -> str:
    """Return ``text`` without characters that a terminal or a page would interpret."""
    return "".join(c if c.isprintable() else "�" for c in text)


def number(value: int | None) -> str:
    """Return ``1,234``, a dash for what is not known."""
    return "–" if value is None else f"{value:,}"


def arrow(change: Change) -> str:
    """Return ``44 → 22``, one dash where neither is known."""
    if change.before is None and change.after is None:
        return number(None)
    return f"{number(change.before)} → {number(change.after)}"


def compact(change: Change) -> str:
    """Return both counts with three digits and one unit.

    >>> compact(Change(4_807_296, 4_315_584)), compact(Change(224, 160))
    ('4.81 → 4.32 M', '224 → 160')
    """
    if change.before is None or change.after is None or change.before < 1000:
        return arrow(change)
    unit, scale = next((unit, scale) for unit, scale in _UNITS if change.before >= scale)
    return f"{_three_digits(change.before / scale)} → {_three_digits(change.after / scale)} {unit}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def percent(change: Change) -> str:
    """Return ``−8.8 %``, nothing where that cannot be said."""
    if not change.before or change.after is None:
        return ""
    if change.before == change.after:
        return "0 %"
    share = 100 * (change.after - change.before) / change.before
    return f"{share:+.{1 if abs(share) >= 0.1 else 2}f} %".replace("-", "−")


def share_of(value: float) -> str:
    """Return a share of 1 as ``98.2 %``, a dash for none."""
    return f"{100 * value:.1f} %" if value == value else number(None)


def shape(sizes: Iterable[int | None]) -> str:
    """Return ``48×3×3×3``."""
    return "×".join("?" if one is None else str(one) for one in sizes)


def counted(count: int, noun: str) -> str:
    """Return ``1 block`` or ``2 blocks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def inputs(facts: InputFacts) -> str:
    """Return the traced shapes, whether they were guessed, and which sizes are free."""
    notes = []
    if facts.is_guessed:
        notes.append("guessed; set it with --input")
    free = [_axis(i, len(one)) for one in facts.shapes for i, length in enumerate(one) if length is None]
    if free:
        notes.append(f"free: {', '.join(dict.fromkeys(free))}")
    examples = ", ".join(shape(example) for example in facts.examples)
    return examples + (f"   ({'; '.join(notes)})" if notes else "")


def _axis(index: int, ndim: int) -> str:
    if index == 0:
        return "batch"
    names = {4: ("", "", "height", "width"), 5: ("", "", "depth", "height", "width"), 3: ("", "length", "length")}
    return names.get(ndim, ("",) * ndim)[index] or f"axis {index}"


def lines(text: str, width: int, indent: int = 0, end: str = "") -> str:
    r"""Return ``text`` broken between words, later lines indented; ``end`` closes each line that goes on.

    A word longer than a line is broken after a dot, slash or underscore, never elsewhere.

    >>> print(lines("stages.2.blocks.0.mlp is left", 16, 2))
    stages.2.
      blocks.0.mlp
      is left
    """
    done: list[str] = []
    line = ""
    for word in text.split(" "):
        room = width - indent - len(end)
        for index, piece in enumerate([word] if len(word) <= room else _pieces(word, room)):
            joint = " " if line.strip() and index == 0 else ""
            if line.strip() and len(line) + len(joint) + len(piece) + len(end) > width:
                done.append(line + end)
                line, joint = " " * indent, ""
            line += joint + piece if piece or joint else " "
    return "\n".join([*done, line])


def _pieces(word: str, room: int) -> list[str]:
    pieces = [""]
    for part in _JOINTS.split(word):
        if pieces[-1] and len(pieces[-1]) + len(part) > room:
            pieces.append("")
        pieces[-1] += part
    return pieces


def command(words: Iterable[str], width: int, before: str = "") -> str:
    r"""Return a command line as one would type it; a line that goes on ends in a backslash, as a shell wants it.

    >>> print(command(["repconv", "fuse", "my model.pt", "out.safetensors"], 24, "Next: "))
    Next: repconv fuse \
      'my model.pt' \
      out.safetensors
    """
    # No break inside quotes, where a backslash would be a letter.
    quoted = " ".join(shlex.quote(plain(word)).replace(" ", "\0") for word in words)
    return lines(before + quoted, width, 2, end=" \\").replace("\0", " ")
