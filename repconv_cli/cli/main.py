"""The ``repconv`` command. Importing this imports no torch: each command does when it runs."""

from __future__ import annotations

import gc
import sys
from typing import Annotated, Any

import typer

from repconv_cli import __version__
from repconv_cli.allocation import return_large_blocks
from repconv_cli.cli.bench import bench
from repconv_cli.cli.fuse import fuse
from repconv_cli.cli.inspect import inspect
from repconv_cli.cli.verify import verify
from repconv_cli.errors import EXIT_INTERRUPTED
from repconv_cli.threads import wait_without_spinning

app = typer.Typer(
    name="repconv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Short enough that none is cut off at 80 columns.
app.command(short_help="Show what can be fused, what cannot and why.")(inspect)
app.command(short_help="Make one convolution of each block, prove it, write the file.")(fuse)
app.command(short_help="Judge a fused file against its source.")(verify)
app.command(short_help="Time the original and the fused model side by side.")(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"repconv {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fuse the branches of re-parameterizable networks into single convolutions, proven equal.

    Exit codes: 0 done and verified; 1 outputs differ (or, with --strict, something was refused or unchecked);
    2 bad input or usage; 70 a bug in repconv; 130 interrupted.

    Examples:

    \b
      repconv inspect model.pt                      what can be fused, what not
      repconv fuse    model.pt model.safetensors    one operator a block, proven
      repconv verify  model.pt model.safetensors    judge the file that lies there
      repconv bench   model.pt model.safetensors    what it gains on this machine

    repconv COMMAND --help shows a command's options, with examples.
    """
    del version


# What typer takes a wrong option for, whichever version of click it carries.
_UsageError: type[Any] = typer.BadParameter.__mro__[1]


def _call() -> int:
    """Return the exit code of the command that was asked for."""
    try:
        return int(app(standalone_mode=False) or 0)
    except _UsageError as error:
        error.show()
        if "--json" in sys.argv:
            from repconv_cli.errors import InputError
            from repconv_cli.report.as_json import error_json

            sys.stdout.write(error_json(InputError(error.format_message())) + "\n")
        return int(error.exit_code)
    except typer.Abort:
        return EXIT_INTERRUPTED


def run() -> None:
    """Run the command line."""
    return_large_blocks()
    if sys.argv[1:2] != ["bench"]:
        # There, threads wait as they do wherever the model will run.
        wait_without_spinning()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show × or → must not end the program.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        sys.exit(_call())
    finally:
        # Python's last collections would walk over all that torch and a model library hold, for more than a second in
        # which the command has said all it has to say.
        gc.freeze()


if __name__ == "__main__":
    run()
