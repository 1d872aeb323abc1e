"""Reports as files, the page of ``--html`` and the drawing of ``--plot``: checked before the work, written after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from repconv_cli.errors import OutputError
from repconv_cli.results import Result


def _html(result: Result, options: tuple[str, ...]) -> str:
    # Loaded only where a page is wanted: the command line must start at once.
    from repconv_cli.report.html import html_page

    return html_page(result, options)


def _plot(result: Result, options: tuple[str, ...]) -> str:
    from repconv_cli.report.plot import speed_plot

    del options
    return speed_plot(result)


@dataclass(frozen=True)
class Kind:
    """A kind of report: the option that asks for it, how its name must end, and what makes its text."""

    option: str
    suffix: str
    text: Callable[[Result, tuple[str, ...]], str]


HTML = Kind("--html", "", _html)
PLOT = Kind("--plot", ".svg", _plot)


@dataclass(frozen=True)
class Page:
    """Where a report goes; ``inputs`` are the files that it must never replace."""

    kind: Kind
    path: Path
    force: bool
    inputs: tuple[Path, ...]

    @classmethod
    def wanted(
        cls, path: Path | None, *, force: bool, inputs: tuple[Path | None, ...], kind: Kind = HTML
    ) -> tuple[Page, ...]:
        """Return the report at ``path``, none where none is wanted."""
        return () if path is None else (cls(kind, path, force, tuple(given for given in inputs if given is not None)),)

    def check(self) -> None:
        """Raise :class:`~repconv_cli.errors.OutputError` if the report cannot be written there."""
        from repconv_cli.checkpoint import check_output

        if not self.path.name.endswith(self.kind.suffix):
            raise OutputError(f"{self.kind.option} {self.path}", needed=f"a name that ends in {self.kind.suffix}")
        for given in self.inputs:
            if os.path.realpath(given) == os.path.realpath(self.path):
                raise OutputError(
                    f"{self.kind.option} names a file that the command reads or writes: {given}",
                    hint="Choose another name.",
                )
            check_output(self.path, force=self.force, source=given)

    def write(self, result: Result, options: tuple[str, ...]) -> None:
        """Write the report of ``result``."""
        from repconv_cli.checkpoint import write_text

        self.check()
        write_text(self.path, self.kind.text(result, options), force=self.force)
