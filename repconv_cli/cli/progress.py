"""What the tool is doing, on stderr: one moving line in a terminal, one line a phase in a log."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.status import Status


class Progress:
    """Called with (phase, done, total); shows the phase, and the count where there is one."""

    def __init__(self, *, quiet: bool) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.quiet = quiet
        self.last = ""
        self.status: Status | None = None

    def __enter__(self) -> Progress:
        if not self.quiet and self.is_terminal:
            self.status = Console(stderr=True).status("Starting")
            self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``phase`` are done; 0 of 0 where nothing is counted."""
        if self.quiet:
            return
        if self.status is not None:
            # A block's name comes from the file: as text, never as markup.
            from rich.markup import escape

            count = f"  {done + 1}/{total}" if total else ""
            self.status.update(escape(f"{phase}{count}"))
            return
        label = phase.split(" ")[0]
        if label != self.last:
            sys.stderr.write(f"{label} …\n")
            sys.stderr.flush()
            self.last = label
