"""``repconv bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.importing import importing
from repconv_cli.cli.options import (
    Choosing,
    Force,
    Judging,
    Opening,
    Showing,
    Source,
    as_typed,
    make_options,
    with_groups,
)
from repconv_cli.cli.page import PLOT, Page
from repconv_cli.cli.progress import Progress
from repconv_cli.options import Timing
from repconv_cli.results import Result


@with_groups
def bench(
    source: Source,
    opening: Opening,
    choosing: Choosing,
    judging: Judging,
    showing: Showing,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="A file that fuse wrote; without one SOURCE is fused in memory."),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="eager, compile, onnxruntime or openvino; repeatable. All that are installed."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of each runtime.")] = 1,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Samples in one call; 1 if free.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="About how long to time in each runtime.")] = 5.0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Also draw the times as bars, into this file.")
    ] = None,
    force: Force = False,
) -> None:
    """Time the original and the fused model side by side, in every runtime that is installed.

    Examples:

    \b
      repconv bench model.pt model.safetensors
      repconv bench model.pt model.safetensors --plot times.svg
      repconv bench model.pt --threads 4 --batch 8 --runtime onnxruntime
      repconv bench weights.pth out.safetensors --arch timm:repvgg_a0 --seconds 20
    """

    def use_case(progress: Progress) -> Result:
        options = make_options(opening, showing, judging, choosing)
        with importing():
            from repconv_cli.gains import bench as measure

        return measure(source, out, options, Timing(tuple(runtime or ()), threads, batch, seconds), progress)

    pages = Page.wanted(showing.html, force=force, inputs=(source, out))
    pages += Page.wanted(plot, force=force, inputs=(source, out, showing.html), kind=PLOT)
    run_command(use_case, showing, as_typed(opening), pages)
