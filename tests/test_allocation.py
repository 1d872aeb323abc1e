"""How memory is taken and given back is the process's affair: only one that is ours is changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from repconv_cli import allocation

MEBI = 1 << 20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the C library is asked to do, in a process that nothing was asked of yet."""
    calls: list[tuple[str, int]] = []

    def mallopt(option: int, value: int) -> int:
        if option == -3:
            calls.append(("return blocks of", value))
        return 1

    def malloc_trim(pad: int) -> int:
        calls.append(("trim", pad))
        return 1

    library = SimpleNamespace(mallopt=mallopt, malloc_trim=malloc_trim)
    monkeypatch.setattr(allocation, "_heap", [])
    monkeypatch.setattr(allocation, "_find_heap", lambda: allocation._Heap(library))
    return calls


def test_a_model_changes_nothing_in_a_process_of_somebody_else(asked: list[tuple[str, int]]) -> None:
    allocation.suit_model(100 * MEBI)
    allocation.return_holes()
    assert asked == []
    allocation.return_large_blocks()
    for weights in (1 * MEBI, 64 * MEBI, 10240 * MEBI):
        allocation.suit_model(weights)
    assert asked == [("return blocks of", size) for size in (8 * MEBI, 256 << 10, 2 * MEBI, 8 * MEBI)]


def test_holes_are_returned_when_the_process_has_grown_by_a_part_of_the_weights(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation.return_large_blocks()
    monkeypatch.setattr(allocation, "_resident", lambda: 10240 * MEBI)
    asked.clear()
    allocation.return_holes()
    assert asked == [], "no model is known yet"
    allocation.suit_model(80 * MEBI)
    asked.clear()
    resident = [0]
    monkeypatch.setattr(allocation, "_resident", lambda: resident[0] * MEBI)
    trims = []
    for resident[0] in (100, 105, 110, 111, 120, 122, 90, 99, 101):
        allocation.return_holes()
        trims.append(len(asked))
        asked.clear()
    # At first; at 111, more than 10 above 100; at 122; and at 101, more than 10 above the lowest since.
    assert trims == [1, 0, 0, 1, 0, 1, 0, 0, 1]


def test_a_system_that_does_not_tell_what_is_resident_is_asked_for_nothing(
    asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise OSError(24, "Too many open files")

    allocation.return_large_blocks()
    asked.clear()
    monkeypatch.setattr(allocation, "_resident", fail)
    allocation.suit_model(MEBI)
    asked.clear()
    allocation.return_holes()
    assert asked == []


def test_holes_between_blocks_in_use_go_back_to_the_system() -> None:
    """Small blocks, every other one freed: glibc keeps their pages, since none lies at the end of its heap."""
    heap = allocation._find_heap()
    if heap is None:
        pytest.skip("the C library is not glibc")
    blocks = [bytearray(60_000) for _ in range(2000)]
    heap.growth = 0
    before = allocation._resident()
    del blocks[::2]
    kept = allocation._resident()
    heap.return_holes()
    assert kept > before - 10 * MEBI
    assert allocation._resident() < before - 40 * MEBI
