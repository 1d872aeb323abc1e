"""``repconv fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repconv_cli.cli import options as o
from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.progress import Progress
from repconv_cli.results import Result


def fuse(
    source: o.Source,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, such as model.safetensors.")],
    arch: o.Arch = None,
    input_: o.Input = None,
    samples: o.Samples = 4,
    seed: o.Seed = 0,
    rtol: o.Rtol = None,
    atol: o.Atol = None,
    max_ratio: o.MaxRatio = 10.0,
    state_key: o.StateKey = None,
    trust: o.Trust = None,
    blocks: o.Blocks = None,
    all_: o.All = False,
    strict: o.Strict = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but the last rename.")] = False,
    json_: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make one convolution of each block, prove it equal, and write a safe file.

    Example: repconv fuse model.pt model.safetensors
    """

    def use_case(progress: Progress) -> Result:
        progress("Starting", 0, 0)
        from repconv_cli import convert

        given = o.make_options(
            arch=arch,
            shapes=input_,
            state_key=state_key,
            trust=trust,
            blocks=blocks,
            strict=strict,
            samples=samples,
            seed=seed,
            rtol=rtol,
            atol=atol,
            max_ratio=max_ratio,
        )
        return convert.fuse(source, out, given, force=force, dry_run=dry_run, progress=progress)

    def exit_code(result: Result) -> int:
        from repconv_cli import convert

        return convert.exit_code(result, strict)

    run_command(use_case, exit_code, as_json=json_, every=all_, quiet=quiet, debug=debug)
