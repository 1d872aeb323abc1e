"""The one place where errors become messages and exit codes, and results become output."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from repconv_cli.cli.options import Showing
from repconv_cli.cli.page import Page
from repconv_cli.cli.progress import Progress
from repconv_cli.errors import EXIT_BUG, EXIT_CANNOT_RUN, EXIT_INTERRUPTED, EXIT_TERMINATED, InputError, RepconvError
from repconv_cli.report.as_json import error_json, result_json
from repconv_cli.report.terminal import Report
from repconv_cli.report.words import lines, plain
from repconv_cli.results import Result

# A pipe has no width: names must not be cut there.
_PIPE_WIDTH = 100_000
_INDENT = " " * len("error: ")


def run_command(
    use_case: Callable[[Any], Result],
    showing: Showing,
    options: tuple[str, ...] = (),
    pages: tuple[Page, ...] = (),
) -> None:
    """Run ``use_case`` with a progress display, print its result, and exit with the command's code.

    ``options`` are those that the next command needs too, ``pages`` are the reports that are written beside.
    """
    try:
        # What a model prints is no part of the report, least of all of a JSON document.
        with Progress(quiet=showing.quiet) as progress, redirect_stdout(sys.stderr):
            for page in pages:
                page.check()
            result = use_case(progress)
            for page in pages:
                progress("Reporting", 0, 0)
                page.write(result, options)
        is_told = _tell(lambda: _print(result, showing, options))
        code = result.exit_code(showing.strict) if is_told else EXIT_CANNOT_RUN
    except RepconvError as error:
        code = error.exit_code
        _fail(error, showing)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        _say("interrupted; nothing was written")
    except SystemExit as error:
        if error.code == EXIT_TERMINATED:
            raise
        told = "" if error.code is None else error.code
        ended = InputError(
            f"the model's own code ended the program: sys.exit({told})",
            hint="Give an --arch file that only makes the model.",
        )
        code = ended.exit_code
        _fail(ended, showing)
    except Exception as error:  # noqa: BLE001 - the boundary: a bug of ours must not look like a mismatch
        code = EXIT_BUG
        bug = RepconvError(f"internal error: {type(error).__name__}: {error}", hint="Please report it, with --debug.")
        _fail(bug, showing)
    raise typer.Exit(code)


def _tell(write: Callable[[], object]) -> bool:
    """Let ``write`` write to stdout; return whether it could, or whoever read it has what they wanted of it."""
    try:
        write()
        sys.stdout.flush()
    except (OSError, SystemExit) as error:
        # Of a pipe that was closed, rich makes the end of the program.
        with suppress(OSError, ValueError):
            # Python would try once more with what is left, and end with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            _say(f"the report cannot be written to stdout ({error.strerror})")
            return False
    return True


def _print(result: Result, showing: Showing, options: tuple[str, ...]) -> None:
    if showing.json:
        sys.stdout.write(result_json(result) + "\n")
    elif not showing.quiet:
        is_terminal = sys.stdout.isatty()
        console = Console(
            force_terminal=is_terminal, width=None if is_terminal else _PIPE_WIDTH, highlight=False, soft_wrap=False
        )
        console.print(
            Report(result, every=showing.all, details=showing.verbose, options=options, page=str(showing.html or ""))
        )


def _fail(error: RepconvError, showing: Showing) -> None:
    if showing.json:
        _tell(lambda: sys.stdout.write(error_json(error) + "\n"))
    if showing.debug:
        traceback.print_exc()
    if not sys.stderr.isatty():
        _say(str(error))
        return
    found = error.found if error.where is None else f"{error.where}: {error.found}"
    _say(found + (f"; needed: {error.needed}" if error.needed else ""), error.hint)


def _say(message: str, hint: str | None = None) -> None:
    """Write an error on stderr: one line in a log; in a terminal broken between words, and what to do on a new line."""
    console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
    width = console.width if console.is_terminal else _PIPE_WIDTH
    parts = [f"error: {plain(message)}", *([] if hint is None else [f"{_INDENT}{plain(hint)}"])]
    text = Text("\n".join(lines(part, width, len(_INDENT)) for part in parts))
    text.stylize("bold red", 0, len("error:"))
    console.print(text)
