"""``repconv fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repconv_cli.checkpoint.hashing import digest_ahead
from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.importing import importing
from repconv_cli.cli.options import Choosing, Judging, Opening, Showing, Source, as_typed, make_options, with_groups
from repconv_cli.cli.page import Page
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


@with_groups
def fuse(
    source: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The file to write: .safetensors, .onnx or .pt2.", readable=False)
    ],
    opening: Opening,
    choosing: Choosing,
    judging: Judging,
    showing: Showing,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT, and the report, if they exist.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but the last rename.")] = False,
) -> None:
    """Make one convolution of each block, prove it equal, and write a safe file.

    Examples:

    \b
      repconv fuse model.pt model.safetensors
      repconv fuse weights.pth out.safetensors --arch net.py:make_net
      repconv fuse model.pt out.safetensors --input 1,3,320,320 --dry-run
      repconv fuse model.pt out.safetensors --blocks 'stages.2.*'
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, judging, choosing)
        with digest_ahead(source):
            with importing():
                from repconv_cli import convert

            return convert.fuse(source, out, options, force=force, dry_run=dry_run, progress=progress)

    pages = Page.wanted(showing.html, force=force, inputs=(source, out))
    run_command(use_case, showing, as_typed(opening), pages)
