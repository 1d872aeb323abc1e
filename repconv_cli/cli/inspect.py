"""``repconv inspect``."""

from __future__ import annotations

from repconv_cli.cli import options as o
from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


def inspect(
    source: o.Source,
    arch: o.Arch = None,
    input_: o.Input = None,
    state_key: o.StateKey = None,
    trust: o.Trust = None,
    blocks: o.Blocks = None,
    all_: o.All = False,
    strict: o.Strict = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Show what can be fused, what cannot and why. Writes nothing.

    Example: repconv inspect model.pt
    """

    def use_case(progress: Progress) -> Result:
        progress("Starting", 0, 0)
        from repconv_cli import convert

        given = o.make_options(arch=arch, shapes=input_, state_key=state_key, trust=trust, blocks=blocks)
        return convert.inspect(source, given, progress)

    def exit_code(result: Result) -> int:
        return int(strict and bool(result.refusals))

    run_command(use_case, exit_code, as_json=json_, every=all_, quiet=quiet, debug=debug)
