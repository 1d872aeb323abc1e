"""Identical neighbours as one row, also where they come in turns: ``stages.2.1…13``."""

from __future__ import annotations

from dataclasses import dataclass

from repconv_cli.results import BlockFacts

# Repeated units of more blocks than this are listed one by one.
_LONGEST_UNIT = 24


@dataclass(frozen=True)
class Row:
    """One or more blocks that are alike but for their place in a sequence."""

    name: str
    blocks: tuple[BlockFacts, ...]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


def fold_rows(blocks: tuple[BlockFacts, ...], *, every: bool = False) -> list[Row]:
    """Return rows for ``blocks``: those that differ only in one number of their name, which counts up, share a row.

    A unit of several blocks that is repeated (``blocks.0.mixer``, ``blocks.0.mlp``, ``blocks.1.mixer``, …) has one
    row for each of its blocks. With ``every``, each block has its own row.
    """
    rows: list[Row] = []
    start = 0
    while start < len(blocks):
        period, repeats = (1, 1) if every else _best_unit(blocks, start)
        stop = start + period * repeats
        rows += [_row(blocks[start + offset : stop : period]) for offset in range(period)]
        start = stop
    return rows


def _best_unit(blocks: tuple[BlockFacts, ...], start: int) -> tuple[int, int]:
    """Return the length of the unit that begins at ``start`` and how often it comes, to save the most rows."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_UNIT, (len(blocks) - start) // 2) + 1):
        repeats = _repeats(blocks, start, period)
        if period * (repeats - 1) > best[0] * (best[1] - 1):
            best = (period, repeats)
    return best


def _repeats(blocks: tuple[BlockFacts, ...], start: int, period: int) -> int:
    """Return how often the unit of ``period`` blocks at ``start`` comes in a row, counting up at one place."""
    first: tuple[int, int] | None = None
    repeats = 1
    while start + period * (repeats + 1) <= len(blocks):
        here = start + period * (repeats - 1)
        places = {_place(blocks[i], blocks[i + period]) for i in range(here, here + period)}
        place = places.pop()
        if places or place is None or first not in (None, place):
            break
        first = place
        repeats += 1
    return repeats


def _place(block: BlockFacts, later: BlockFacts) -> tuple[int, int] | None:
    """Return which part of the names counts up, and by how much; None if the blocks are not alike."""
    if (block.kind, block.weight_shape, block.ops, block.macs) != (
        later.kind,
        later.weight_shape,
        later.ops,
        later.macs,
    ):
        return None
    a, b = block.name.split("."), later.name.split(".")
    if len(a) != len(b):
        return None
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if len(places) != 1 or not (a[places[0]].isdecimal() and b[places[0]].isdecimal()):
        return None
    step = int(b[places[0]]) - int(a[places[0]])
    return (places[0], step) if step > 0 else None


def _row(blocks: tuple[BlockFacts, ...]) -> Row:
    if len(blocks) == 1:
        return Row(blocks[0].name, blocks)
    found = _place(blocks[0], blocks[1])
    assert found is not None
    place, parts = found[0], blocks[0].name.split(".")
    parts[place] = f"{parts[place]}…{blocks[-1].name.split('.')[place]}"
    return Row(".".join(parts), blocks)
