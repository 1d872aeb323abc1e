"""Times of two forms of one model: interleaved rounds, a ratio per round, the median of the ratios and its interval."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

Run = Callable[[], object]
# Makes a model ready to be called, in memory of its own where the runtime allows.
Load = Callable[[], Run]

ROUNDS = 20
FEWEST_ROUNDS = 6
CONFIDENCE = 0.95
_SECONDS_PER_SAMPLE = 0.03
_WARM_UP = 3
# Of each sample, so much again is run before it and not timed.
_WARM_UP_PER_SAMPLE = 0.4


@dataclass(frozen=True)
class Interval:
    """A median, and the range that holds the true one with a probability of at least :data:`CONFIDENCE`."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """Seconds of one call of each form, by name, in rounds that all forms took part in."""

    seconds: dict[str, list[float]]

    @property
    def count(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.seconds.values())))

    def milliseconds(self, form: str) -> float:
        """Return the median time of one call."""
        return 1e3 * statistics.median(self.seconds[form])

    def spread(self, form: str) -> float:
        """Return how far apart the quartiles of the times are, in milliseconds: half of the rounds lie between them."""
        first, _, third = statistics.quantiles(self.seconds[form], n=4, method="inclusive")
        return 1e3 * (third - first)

    def ratio(self, form: str, reference: str) -> Interval:
        """Return how many times as long as ``reference`` a form takes, from the ratio within each round."""
        return interval([a / b for a, b in zip(self.seconds[form], self.seconds[reference], strict=True)])


def take_turns(loads: dict[str, Load], *, threads: int, seconds: float, rounds: int = ROUNDS) -> Rounds:
    """Return the times of all forms, taken in turns in about ``seconds``, in at most ``rounds`` rounds.

    A machine slows down and speeds up while it works, and all forms of one round alike, so ratios are taken within a
    round. The same file runs some percent faster or slower by what was loaded before it, so the forms are loaded in
    each order that there is, for as many rounds each. With one thread the processor time counts, which leaves out what
    other programs take; else the clock.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    orders = [{name: loads[name] for name in order} for order in permutations(loads)]
    repeats: dict[str, int] = {}
    found = [_loaded_once(orders[0], repeats, clock, max(1, rounds // len(orders)), seconds / len(orders))]
    found.extend(_loaded_once(order, repeats, clock, found[0].count, math.inf) for order in orders[1:])
    return Rounds({name: [value for part in found for value in part.seconds[name]] for name in loads})


def _loaded_once(
    loads: dict[str, Load], repeats: dict[str, int], clock: Callable[[], float], rounds: int, seconds: float
) -> Rounds:
    """Return rounds of forms loaded in this order; ``repeats`` are found out the first time."""
    runs = {name: load() for name, load in loads.items()}
    if not repeats:
        repeats.update({name: _repeats(run) for name, run in runs.items()})
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + seconds
    fewest = math.ceil(FEWEST_ROUNDS / math.factorial(len(loads)))
    for done in range(rounds):
        # The order changes, so that no form always runs after the same other one.
        start = done % len(runs)
        for name in (*list(runs)[start:], *list(runs)[:start]):
            times[name].append(_sample(runs[name], repeats[name], clock))
        if time.perf_counter() > until and done + 1 >= fewest:
            break
    return Rounds(times)


def _repeats(run: Run) -> int:
    """Warm up, and return how many calls make one sample."""
    for _ in range(_WARM_UP):
        run()
    return max(1, round(_SECONDS_PER_SAMPLE / max(_sample(run, 2, time.perf_counter), 1e-9)))


def _sample(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    # The first calls after another form ran find the caches full of that one's weights, for some ten milliseconds.
    for _ in range(math.ceil(_WARM_UP_PER_SAMPLE * repeats)):
        run()
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def interval(values: list[float]) -> Interval:
    """Return the median of ``values`` and its interval, from ranks alone: no shape of their spread is assumed.

    Each value lies below the true median with probability one half, so the number that do is binomial. The interval
    is from the ``k``-th smallest to the ``k``-th largest value, ``k`` as large as :data:`CONFIDENCE` allows.

    >>> interval([float(value) for value in range(1, 22)])
    Interval(low=6.0, median=11.0, high=16.0)
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0.0, 0
    for index in range(count // 2):
        outside += 2 * math.comb(count, index) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        rank = index
    return Interval(ordered[rank], statistics.median(ordered), ordered[count - 1 - rank])
