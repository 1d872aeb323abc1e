"""The options that commands share, one name each, in groups that a command takes whole."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from repconv_cli.errors import InputError
from repconv_cli.options import MAX_RATIO, Limits, Options

# What cannot be read is told by the reader, in one line: typer takes three, with the name as it is.
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A checkpoint: saved module, .pt2 program, hub folder, ONNX model, or weights with --arch.",
        readable=False,
    ),
]


Force = Annotated[bool, typer.Option("--force", help="Overwrite the report if it exists.")]


@dataclass(frozen=True)
class Opening:
    """How the source is opened."""

    arch: Annotated[
        str | None,
        typer.Option(
            "--arch",
            metavar="ARCH",
            help="What weights belong to: file.py:callable, timm:NAME, torchvision:NAME, transformers:DIR or "
            "ultralytics:YAML (options: timm:NAME,num_classes=10). Runs that code.",
        ),
    ] = None
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="Input shape such as 1,3,224,224; once for each input. Guessed where it can be.",
        ),
    ] = None
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="FILE",
            help="Own data to trace and compare with: .npz or .safetensors, named as forward's.",
        ),
    ] = None
    state_key: Annotated[
        str | None, typer.Option("--state-key", metavar="KEY", help="Entry of the checkpoint to take the weights from.")
    ] = None
    eps: Annotated[
        float | None,
        typer.Option("--eps", min=0, metavar="EPS", help="eps of all norms of weights alone, if not their family's."),
    ] = None
    trust: Annotated[
        list[str] | None,
        typer.Option(
            "--trust", metavar="PACKAGE", help="Installed package whose nn.Module classes may be restored; repeatable."
        ),
    ] = None


@dataclass(frozen=True)
class Judging:
    """How outputs are compared."""

    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Random inputs to compare outputs on.")
    ] = 4
    seed: Annotated[
        int, typer.Option("--seed", min=-(2**62), max=2**62, metavar="N", help="Seed of the random inputs.")
    ] = 0
    rtol: Annotated[
        float | None,
        typer.Option("--rtol", min=0, metavar="X", help="Judge by |Δ| ≤ atol + rtol·|y| instead of by noise."),
    ] = None
    atol: Annotated[float | None, typer.Option("--atol", min=0, metavar="X", help="See --rtol.")] = None
    max_ratio: Annotated[
        float, typer.Option("--max-ratio", min=0, metavar="X", help="Largest difference, in units of rounding noise.")
    ] = MAX_RATIO


@dataclass(frozen=True)
class Choosing:
    """What of it is fused."""

    blocks: Annotated[
        str | None,
        typer.Option("--blocks", metavar="GLOB", help="Fuse only blocks whose name matches, such as 'stages.2.*'."),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="FORM",
            help="full: fuse all there is, the default. deploy: what the family's deploy class loads, key for key.",
        ),
    ] = None


@dataclass(frozen=True)
class Showing:
    """What is printed, and what counts as success."""

    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a report to look at: graph, blocks, kernels. One HTML file."
        ),
    ] = None
    all: Annotated[bool, typer.Option("--all", help="List each block and each refusal.")] = False
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 also where something was refused or left unchecked.")
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Add each block's keys and proof, every sample, and the time.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command`` as Typer wants it: each parameter that is a group becomes that group's options.

    Typer has no groups of options; a signature with the fields written out is all that it needs.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    plain: list[inspect.Parameter] = []
    grouped: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            grouped += _parameters(groups[parameter.name])
        else:
            keyword = parameter.default is not inspect.Parameter.empty
            kind = inspect.Parameter.KEYWORD_ONLY if keyword else parameter.kind
            (grouped if keyword else plain).append(parameter.replace(annotation=hints[parameter.name], kind=kind))

    @functools.wraps(command)
    def flat(**given: Any) -> None:
        taken = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **taken)

    flat.__signature__ = inspect.Signature([*plain, *grouped])  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in (*plain, *grouped)}
    del flat.__wrapped__
    return flat


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]


def as_typed(group: Any) -> tuple[str, ...]:
    """Return the options of ``group`` that were given, as they would be typed again.

    >>> as_typed(Opening(arch="timm:repvgg_a0", input=["1,3,64,64"]))
    ('--arch', 'timm:repvgg_a0', '--input', '1,3,64,64')
    """
    words: list[str] = []
    for field in fields(group):
        value = getattr(group, field.name)
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                words.append(f"--{field.name.replace('_', '-')}")
            elif one not in (None, False, field.default):
                words += [f"--{field.name.replace('_', '-')}", str(one)]
    return tuple(words)


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
    opening: Opening, showing: Showing, judging: Judging | None = None, choosing: Choosing | None = None
) -> Options:
    """Return the options of the use cases."""
    judging, choosing = judging or Judging(), choosing or Choosing()
    return Options(
        arch=opening.arch,
        input=tuple(parse_shape(text) for text in opening.input or ()),
        inputs=opening.inputs,
        samples=judging.samples,
        seed=judging.seed,
        limits=Limits(judging.max_ratio, judging.rtol, judging.atol),
        state_key=opening.state_key,
        trust=tuple(opening.trust or ()),
        blocks=choosing.blocks,
        strict=showing.strict,
        draw=showing.html is not None,
        target=_target(choosing.target),
        eps=opening.eps,
    )


def _target(text: str | None) -> str | None:
    if text not in (None, "full", "deploy"):
        raise InputError(f"--target {text[:60]!r}", needed="full or deploy")
    return text
