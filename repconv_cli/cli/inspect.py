"""``repconv inspect``."""

from __future__ import annotations

from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.options import Choosing, Opening, Showing, Source, make_options, with_groups
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


@with_groups
def inspect(source: Source, opening: Opening, choosing: Choosing, showing: Showing) -> None:
    """Show what can be fused, what cannot and why. Writes nothing.

    Example: repconv inspect model.pt
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, choosing=choosing)
        from repconv_cli.contents import inspect_contents

        found = inspect_contents(source, options)
        if found is not None:
            return found
        from repconv_cli import convert

        return convert.inspect(source, options, progress)

    run_command(use_case, showing)
