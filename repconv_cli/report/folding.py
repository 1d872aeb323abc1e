"""Identical neighbours as one row: ``stages.2.1…13``."""

from __future__ import annotations

from dataclasses import dataclass

from repconv_cli.results import BlockFacts


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
    """Return rows for ``blocks``; neighbours that differ only in one number of their name share a row.

    With ``every``, each block has its own row.
    """
    rows: list[list[BlockFacts]] = []
    for block in blocks:
        if rows and not every and _continues(rows[-1], block):
            rows[-1].append(block)
        else:
            rows.append([block])
    return [Row(_name(row), tuple(row)) for row in rows]


def _continues(row: list[BlockFacts], block: BlockFacts) -> bool:
    last = row[-1]
    if (last.kind, last.weight_shape, last.ops, last.macs) != (block.kind, block.weight_shape, block.ops, block.macs):
        return False
    place = _differing_place(last.name, block.name)
    return place is not None and (len(row) == 1 or _differing_place(row[-2].name, last.name) == place)


def _differing_place(left: str, right: str) -> int | None:
    """Return the index of the one part where two names count up by one, or None."""
    a, b = left.split("."), right.split(".")
    if len(a) != len(b):
        return None
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if len(places) != 1 or not (a[places[0]].isdigit() and b[places[0]].isdigit()):
        return None
    return places[0] if int(b[places[0]]) > int(a[places[0]]) else None


def _name(row: list[BlockFacts]) -> str:
    if len(row) == 1:
        return row[0].name
    place = _differing_place(row[0].name, row[1].name)
    parts = row[0].name.split(".")
    assert place is not None
    parts[place] = f"{parts[place]}…{row[-1].name.split('.')[place]}"
    return ".".join(parts)
