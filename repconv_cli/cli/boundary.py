"""The one place where errors become messages and exit codes, and results become output."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from repconv_cli.cli.options import Showing
from repconv_cli.cli.progress import Progress
from repconv_cli.errors import EXIT_BUG, EXIT_INTERRUPTED, RepconvError
from repconv_cli.report.as_json import error_json, result_json
from repconv_cli.report.terminal import Report
from repconv_cli.report.words import plain
from repconv_cli.results import Result

# A pipe has no width: names must not be cut there.
_PIPE_WIDTH = 100_000


def run_command(
    use_case: Callable[[Any], Result],
    showing: Showing,
) -> None:
    """Run ``use_case`` with a progress display, print its result, and exit with the command's code."""
    try:
        with Progress(quiet=showing.quiet) as progress:
            progress("Starting", 0, 0)
            result = use_case(progress)
        _print(result, showing)
        code = result.exit_code(showing.strict)
    except RepconvError as error:
        code = error.exit_code
        _fail(error, showing)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        _say("interrupted; nothing was written")
    except (BrokenPipeError, SystemExit):
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: a bug of ours must not look like a mismatch
        code = EXIT_BUG
        bug = RepconvError(f"internal error: {type(error).__name__}: {error}", hint="Please report it, with --debug.")
        _fail(bug, showing)
    raise typer.Exit(code)


def _print(result: Result, showing: Showing) -> None:
    if showing.json:
        sys.stdout.write(result_json(result) + "\n")
    elif not showing.quiet:
        is_terminal = sys.stdout.isatty()
        console = Console(
            force_terminal=is_terminal, width=None if is_terminal else _PIPE_WIDTH, highlight=False, soft_wrap=False
        )
        console.print(Report(result, every=showing.all))


def _fail(error: RepconvError, showing: Showing) -> None:
    if showing.json:
        sys.stdout.write(error_json(error) + "\n")
    if showing.debug:
        traceback.print_exc()
    _say(str(error))


def _say(message: str) -> None:
    is_terminal = sys.stderr.isatty()
    # A terminal gets lines broken between words; a log gets one line.
    console = Console(stderr=True, force_terminal=is_terminal, highlight=False, soft_wrap=not is_terminal)
    console.print(Text.assemble(("error: ", "bold red"), plain(message)))
