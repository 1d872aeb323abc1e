"""Rounds are interleaved, ratios taken within a round, and the interval is the one that ranks give."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from repconv_cli.timing import rounds as timing
from repconv_cli.timing.rounds import CONFIDENCE, interval, take_turns


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        found = interval([draw.expovariate(1) for _ in range(21)])
        held += found.low <= 0.6931471805599453 <= found.high
    assert held / 2000 >= CONFIDENCE


def test_the_interval_of_few_values_is_their_range_and_of_equal_ones_is_narrow():
    assert interval([3.0, 1.0, 2.0]) == timing.Interval(1.0, 2.0, 3.0)
    assert interval([2.0] * 9) == timing.Interval(2.0, 2.0, 2.0)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Callable[[], None]]:
    """Give calls that take a pretended time each, and log their order."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    order: list[str] = []

    def make(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds * (1 + len(order) / 1e4)  # the machine slows down as it works
            order.append(name)

        return call

    make.order = order  # type: ignore[attr-defined]
    return make


def test_a_machine_that_slows_down_does_not_change_the_ratio(pretend: Callable[..., Callable[[], None]]) -> None:
    found = take_turns({"original": pretend("a", 0.1), "fused": pretend("b", 0.05)}, threads=1, seconds=1e9)
    assert found.count == timing.ROUNDS
    assert found.ratio("original", "fused").median == pytest.approx(2.0, rel=1e-3)
    assert found.ratio("original", "fused").low <= 2.0 <= found.ratio("original", "fused").high
    # Both orders, as often as each other.
    rounds = pretend.order[-2 * timing.ROUNDS :]  # type: ignore[attr-defined]
    assert {tuple(rounds[i : i + 2]) for i in range(0, len(rounds), 2)} == {("a", "b"), ("b", "a")}


def test_short_calls_are_repeated_and_the_time_is_kept_to(pretend: Callable[..., Callable[[], None]]) -> None:
    found = take_turns({"original": pretend("a", 1e-4), "fused": pretend("b", 1e-4)}, threads=4, seconds=0.5)
    calls = len(pretend.order)  # type: ignore[attr-defined]
    assert found.count < timing.ROUNDS
    assert calls / found.count > 100
