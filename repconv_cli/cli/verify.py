"""``repconv verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repconv_cli.checkpoint.hashing import digest_ahead
from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.importing import importing
from repconv_cli.cli.options import Force, Judging, Opening, Showing, Source, as_typed, make_options, with_groups
from repconv_cli.cli.page import Page
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


@with_groups
def verify(
    source: Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file that fuse wrote.", readable=False)],
    opening: Opening,
    judging: Judging,
    showing: Showing,
    force: Force = False,
) -> None:
    """Compare the outputs of SOURCE and OUT on random inputs, and OUT's tensors with a new plan.

    Examples:

    \b
      repconv verify model.pt model.safetensors
      repconv verify model.pt model.safetensors --samples 16 --seed 1
      repconv verify weights.pth out.safetensors --arch net.py:make_net --html report.html
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, judging)
        with digest_ahead(source):
            with importing():
                from repconv_cli import convert

            return convert.verify(source, out, options, progress)

    pages = Page.wanted(showing.html, force=force, inputs=(source, out))
    run_command(use_case, showing, as_typed(opening), pages)
