"""``repconv fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.options import Choosing, Judging, Opening, Showing, Source, make_options, with_groups
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


@with_groups
def fuse(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write, such as model.safetensors.", readable=False)
    ],
    opening: Opening,
    choosing: Choosing,
    judging: Judging,
    showing: Showing,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but the last rename.")] = False,
) -> None:
    """Make one convolution of each block, prove it equal, and write a safe file.

    Example: repconv fuse model.pt model.safetensors
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, judging, choosing)
        from repconv_cli import convert

        return convert.fuse(source, out, options, force=force, dry_run=dry_run, progress=progress)

    run_command(use_case, showing)
