"""``repconv inspect``."""

from __future__ import annotations

from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.importing import importing
from repconv_cli.cli.options import Choosing, Force, Opening, Showing, Source, as_typed, make_options, with_groups
from repconv_cli.cli.page import Page
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


@with_groups
def inspect(source: Source, opening: Opening, choosing: Choosing, showing: Showing, force: Force = False) -> None:
    """Show what can be fused, what cannot and why. Writes no model.

    Examples:

    \b
      repconv inspect model.pt
      repconv inspect weights.safetensors --arch timm:repvgg_a0
      repconv inspect model.pt --html report.html
      repconv inspect model.pt --json | jq .totals.convs
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, choosing=choosing)
        from repconv_cli.contents import inspect_contents

        found = inspect_contents(source, options)
        if found is not None:
            return found
        with importing():
            from repconv_cli import convert

        return convert.inspect(source, options, progress)

    pages = Page.wanted(showing.html, force=force, inputs=(source,))
    run_command(use_case, showing, as_typed(opening), pages)
