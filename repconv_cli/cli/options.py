"""The options that commands share, one name each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repconv_cli.errors import InputError

if TYPE_CHECKING:
    from repconv_cli.convert import Options

Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A checkpoint: saved module, .pt2 program, or weights with --arch.")
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", help="What weights belong to: file.py:callable, timm:NAME or torchvision:NAME. Runs that code."
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Input shape such as 1,3,224,224; once for each input. Guessed where it can be."),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Random inputs to compare outputs on.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the random inputs.")]
Rtol = Annotated[
    float | None, typer.Option("--rtol", min=0, help="Judge by |Δ| ≤ atol + rtol·|y| instead of by noise.")
]
Atol = Annotated[float | None, typer.Option("--atol", min=0, help="See --rtol.")]
MaxRatio = Annotated[float, typer.Option("--max-ratio", min=0, help="Largest difference, in units of rounding noise.")]
StateKey = Annotated[str | None, typer.Option("--state-key", help="Entry of the checkpoint to take the weights from.")]
Trust = Annotated[
    list[str] | None, typer.Option("--trust", help="Installed package whose nn.Module classes may be restored.")
]
Blocks = Annotated[
    str | None, typer.Option("--blocks", help="Fuse only blocks whose name matches, such as 'stages.2.*'.")
]
All = Annotated[bool, typer.Option("--all", help="List each block and each refusal.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 1 also where something was refused or left unchecked.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the shape written as ``1,3,224,224``.

    >>> parse_shape("1,3,224,224")
    (1, 3, 224, 224)
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or any(size < 1 for size in shape):
        raise InputError(f"--input {text[:60]!r}", needed="positive numbers with commas, such as 1,3,224,224")
    return shape


def make_options(
    *,
    arch: str | None,
    shapes: list[str] | None,
    state_key: str | None,
    trust: list[str] | None,
    blocks: str | None = None,
    strict: bool = False,
    samples: int = 4,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    max_ratio: float = 10.0,
) -> Options:
    """Return the options of the use cases; this imports torch."""
    from repconv_cli.convert import Options
    from repconv_cli.verdict import Limits

    return Options(
        arch=arch,
        input=tuple(parse_shape(text) for text in shapes or ()),
        samples=samples,
        seed=seed,
        limits=Limits(max_ratio, rtol, atol),
        state_key=state_key,
        trust=tuple(trust or ()),
        blocks=blocks,
        strict=strict,
    )
