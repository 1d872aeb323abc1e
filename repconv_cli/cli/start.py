"""Where the process starts: a sign of life before anything is imported, then the command line."""

from __future__ import annotations

import sys

from repconv_cli.cli import FIRST_PHASE
from repconv_cli.errors import EXIT_INTERRUPTED

_SAY_NOTHING = {"-h", "--help", "-q", "--quiet"}


def run() -> None:
    """Say on stderr that the command has started, and run it.

    What parses options and draws tables takes a third of a second to import. In a terminal the line is overwritten.
    """
    arguments = sys.argv[1:]
    if len(arguments) > 1 and not _SAY_NOTHING.intersection(arguments):
        end = "\r" if sys.stderr.isatty() else "\n"
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stderr.write(f"{FIRST_PHASE} …{end}")
        sys.stderr.flush()
    try:
        from repconv_cli.cli import main
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    main.run()
