"""Rounds are interleaved, ratios taken within a round, and the interval is the one that ranks give."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from repconv_cli.timing import rounds as timing
from repconv_cli.timing.rounds import CONFIDENCE, Load, Run, interval, take_turns


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


@dataclass
class Machine:
    """A machine of pretended time: it slows down as it works, and has the habits that it is given."""

    # Seconds that the calls after another form ran take longer, all together, at most a fifth each.
    switching: float = 0.0
    # Times as long that what was loaded first takes, with nothing else in memory.
    first_loaded: float = 1.0
    slowing: float = 1e-4
    now: float = 0.0
    cold: float = 0.0
    order: list[str] = field(default_factory=list)
    loaded: dict[str, weakref.ref[Callable[[], None]]] = field(default_factory=dict)

    def load(self, name: str, seconds: float) -> Load:
        """Return what loads a form that takes ``seconds`` a call."""

        def load() -> Run:
            is_first = all(run() is None for run in self.loaded.values())
            own = seconds * (self.first_loaded if is_first else 1)

            def call() -> None:
                if self.order and self.order[-1] != name:
                    self.cold = self.switching
                paid = min(self.cold, own / 5)
                self.cold -= paid
                self.now += (own + paid) * (1 + len(self.order) * self.slowing)
                self.order.append(name)

            self.loaded[name] = weakref.ref(call)
            return call

        return load


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(timing.time, "process_time", lambda: found.now)
    return found


def test_a_machine_that_slows_down_does_not_change_the_ratio(machine: Machine) -> None:
    found = take_turns({"original": machine.load("a", 0.1), "fused": machine.load("b", 0.05)}, threads=1, seconds=1e9)
    assert found.count == timing.ROUNDS
    ratio = found.ratio("original", "fused")
    assert ratio.median == pytest.approx(2.0, rel=1e-3)
    assert ratio.low <= 2.0 <= ratio.high


@pytest.mark.parametrize("names", [("original", "fused"), ("original", "repconv", "own")])
def test_what_ran_before_favours_no_form(machine: Machine, names: tuple[str, ...]) -> None:
    machine.switching, machine.slowing = 0.0014, 0.0
    found = take_turns({name: machine.load(name, 0.002) for name in names}, threads=1, seconds=1e9)
    for name in names[1:]:
        ratio = found.ratio(names[0], name)
        assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.0, 1.0, 1.0), rel=1e-6)


@pytest.mark.parametrize("names", [("original", "fused"), ("original", "repconv", "own")])
def test_what_was_loaded_before_favours_no_form(machine: Machine, names: tuple[str, ...]) -> None:
    machine.first_loaded, machine.slowing = 1.05, 0.0
    found = take_turns({name: machine.load(name, 0.002) for name in names}, threads=1, seconds=1e9)
    for name in names[1:]:
        ratio = found.ratio(names[0], name)
        assert ratio.median == pytest.approx(1.0, abs=0.01)
        # What it makes of a form is part of the interval.
        assert (ratio.low, ratio.high) == pytest.approx((1 / 1.05, 1.05), rel=0.01)


def test_a_form_is_not_in_memory_twice(machine: Machine) -> None:
    alive: list[int] = []
    load = machine.load("a", 0.1)

    def counted() -> Run:
        gc.collect()
        alive.append(sum(run() is not None for run in machine.loaded.values()))
        return load()

    take_turns({"a": counted, "b": machine.load("b", 0.1)}, threads=4, seconds=0)
    # Loaded before the other form, then after it, and never beside itself.
    assert alive == [0, 1]


def test_short_calls_are_repeated_and_the_time_is_kept_to(machine: Machine) -> None:
    machine.slowing = 0.0
    found = take_turns({"original": machine.load("a", 1e-4), "fused": machine.load("b", 1e-4)}, threads=4, seconds=0.5)
    assert found.count < timing.ROUNDS
    assert len(machine.order) / found.count > 100
    assert machine.now < 1.5 * 0.5
