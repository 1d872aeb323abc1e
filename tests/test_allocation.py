"""How memory is taken is the process's affair: only one that is ours is changed."""

from __future__ import annotations

import pytest

from repconv_cli import allocation


def test_a_model_changes_nothing_in_a_process_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(allocation, "_chosen", [])
    monkeypatch.setattr(allocation, "_return_blocks_of", lambda size: asked.append(size) or True)
    allocation.suit_model(100 << 20)
    assert asked == []
    allocation.return_large_blocks()
    for weights in (1 << 20, 64 << 20, 10 << 30):
        allocation.suit_model(weights)
    assert asked == [8 << 20, 256 << 10, 2 << 20, 8 << 20]
