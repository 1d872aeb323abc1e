"""The HTML report as a file: checked before the work starts, written whole when it is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from repconv_cli.errors import OutputError
from repconv_cli.results import Result


@dataclass(frozen=True)
class Page:
    """Where the report goes; ``inputs`` are the files that it must never replace."""

    path: Path
    force: bool
    inputs: tuple[Path, ...]

    @classmethod
    def wanted(cls, path: Path | None, *, force: bool, inputs: tuple[Path, ...]) -> Page | None:
        """Return the page at ``path``, None where none is wanted."""
        return None if path is None else cls(path, force, inputs)

    def check(self) -> None:
        """Raise :class:`~repconv_cli.errors.OutputError` if the report cannot be written there."""
        from repconv_cli.checkpoint import check_output

        for given in self.inputs:
            if os.path.realpath(given) == os.path.realpath(self.path):
                raise OutputError(
                    f"--html names a file that the command reads or writes: {given}", hint="Choose another name."
                )
            check_output(self.path, force=self.force, source=given)

    def write(self, result: Result, options: tuple[str, ...]) -> None:
        """Write the report of ``result``."""
        # Loaded only where a page is wanted: the command line must start at once.
        from repconv_cli.checkpoint import write_text
        from repconv_cli.report.html import html_page

        self.check()
        write_text(self.path, html_page(result, options), force=self.force)
