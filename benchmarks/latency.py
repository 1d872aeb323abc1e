"""Latency of the same model in several forms, side by side: interleaved rounds, ratios per round, one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.record import Latency, Spread
from repconv_cli.timing.rounds import Interval, Rounds, take_turns
from repconv_cli.timing.runtimes import RUNTIMES

SECONDS_PER_RUNTIME = 6.0


def measure(runtime: str, modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Latency:
    """Return the latencies of ``modules`` ("original", "repconv", perhaps "own") in a runtime."""
    make, _ = RUNTIMES[runtime]
    with torch.inference_mode() if runtime == "eager" else torch.no_grad():
        loads = {name: make(module, (args, kwargs), 1) for name, module in modules.items()}
        return _latency(take_turns(loads, threads=1, seconds=SECONDS_PER_RUNTIME))


def _latency(rounds: Rounds) -> Latency:
    own = _spread(rounds.ratio("own", "repconv")) if "own" in rounds.seconds else None
    return Latency(rounds.milliseconds("repconv"), _spread(rounds.ratio("original", "repconv")), own)


def _spread(interval: Interval) -> Spread:
    return Spread(interval.low, interval.median, interval.high)
