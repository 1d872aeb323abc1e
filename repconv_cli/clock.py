"""Seconds of each phase of a command, and the progress line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""

T = TypeVar("T")


class Clock:
    """Takes the time of each phase and tells the progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.report: Progress = progress or (lambda phase, done, total: None)

    @contextmanager
    def phase(self, name: str, total: int = 0) -> Iterator[None]:
        """Take the time of what runs inside, as ``name``."""
        start = time.perf_counter()
        self.report(name, 0, total)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def counting(phase: str, items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """Yield ``items``, and tell before each how many of ``total`` are done."""
    for done, item in enumerate(items):
        if progress is not None:
            progress(phase, done, total)
        yield item
