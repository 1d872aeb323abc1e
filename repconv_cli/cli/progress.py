"""What the tool is doing, on stderr: one moving line in a terminal, plain lines in a log, and never a long silence."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from repconv_cli.cli import FIRST_PHASE
from repconv_cli.report.words import plain

_SILENCE_SECONDS = 0.9
_BAR = 24


class Progress:
    """Called with (phase, done, total): shows the phase, the count where there is one, and the time."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.is_terminal = sys.stderr.isatty()
        self.phase = self.label = FIRST_PHASE
        self.done = self.total = 0
        self.started = self.spoken = time.monotonic()
        self.live: Live | None = None
        self.stopped = threading.Event()
        self.spinner = Spinner("dots")

    def __enter__(self) -> Progress:
        if self.quiet:
            return self
        if self.is_terminal:
            console = Console(stderr=True)
            self.live = Live(get_renderable=self._line, console=console, refresh_per_second=10, transient=True)
            self.live.start()
        else:
            threading.Thread(target=self._say_that_it_goes_on, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        if self.live is not None:
            self.live.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``phase`` are done; 0 of 0 where nothing is counted."""
        label = phase.split(" ")[0]
        is_new = label != self.label
        if is_new:
            self.started = time.monotonic()
        self.phase, self.done, self.total, self.label = plain(phase), done, total, label
        if is_new and not self.quiet and self.live is None:
            self._write(f"{label} …")

    def _say_that_it_goes_on(self) -> None:
        while not self.stopped.wait(max(self.spoken + _SILENCE_SECONDS - time.monotonic(), 0.01)):
            if time.monotonic() - self.spoken < _SILENCE_SECONDS:
                continue
            count = f"{self.done} of {self.total}, " if self.total else ""
            self._write(f"{self.label} … {count}{time.monotonic() - self.started:.0f} s")

    def _write(self, text: str) -> None:
        if not self.stopped.is_set():
            self.spoken = time.monotonic()
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def _line(self) -> Table:
        """Return the moving line: phase, bar, count, time, and an estimate of what is left."""
        seconds = time.monotonic() - self.started
        cells: list[Text | Spinner | ProgressBar] = [self.spinner]
        if self.total:
            cells += [ProgressBar(self.total, self.done, width=_BAR), Text(f"{self.done}/{self.total}")]
        cells += [Text(self.phase, no_wrap=True, overflow="ellipsis"), Text(_time(seconds, self.done, self.total))]
        line = Table.grid(padding=(0, 1, 0, 0))
        for cell in cells:
            line.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if cell is cells[-2] else None)
        line.add_row(*cells)
        return line


def _time(seconds: float, done: int, total: int) -> str:
    """Return the time spent, and what is left if the steps go on as they did.

    >>> _time(4.2, 3, 12), _time(4.2, 0, 0)
    ('4 s, about 13 s left', '4 s')
    """
    spent = f"{seconds:.0f} s"
    return f"{spent}, about {seconds / done * (total - done):.0f} s left" if done and seconds > 1 else spent
