"""Which blocks share a row."""

from __future__ import annotations

import pytest

from repconv_cli.report.folding import fold_rows
from tests.report.made import REPVGG_A0, block


def names(*blocks: str) -> list[tuple[str, int]]:
    return [(row.name, row.count) for row in fold_rows(tuple(block(name) for name in blocks))]


@pytest.mark.parametrize(
    ("blocks", "rows"),
    [
        (["a.0", "a.1", "a.2"], [("a.0…2", 3)]),
        (["a.0", "a.2", "a.4"], [("a.0…4", 3)]),
        (["a.0", "a.1", "a.3"], [("a.0…1", 2), ("a.3", 1)]),
        (["a.0.x", "a.0.y", "a.1.x", "a.1.y"], [("a.0…1.x", 2), ("a.0…1.y", 2)]),
        (["s", "a.0.x", "a.0.y", "a.1.x", "a.1.y", "a.2.x"], [("s", 1), ("a.0…1.x", 2), ("a.0…1.y", 2), ("a.2.x", 1)]),
        (["a.1", "a.0"], [("a.1", 1), ("a.0", 1)]),
        (["a.0.1", "a.1.1", "b.1"], [("a.0…1.1", 2), ("b.1", 1)]),
        ([], []),
    ],
)
def test_rows(blocks: list[str], rows: list[tuple[str, int]]) -> None:
    assert names(*blocks) == rows


def test_blocks_of_different_shapes_do_not_share_a_row() -> None:
    rows = fold_rows((block("a.0"), block("a.1", weight=(16, 8, 3, 3))))
    assert [row.count for row in rows] == [1, 1]


def test_every_block_is_in_exactly_one_row() -> None:
    rows = fold_rows(REPVGG_A0)
    assert sorted(b.name for row in rows for b in row.blocks) == sorted(b.name for b in REPVGG_A0)
    assert len(fold_rows(REPVGG_A0, every=True)) == len(REPVGG_A0)
