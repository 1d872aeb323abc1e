"""Weights alone: inspected, fused and verified block by block, with what cannot be known said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from repconv_cli.by_family import DeployForm, partial, recognise, totals_alone
from repconv_cli.checkpoint import write_safetensors
from repconv_cli.checkpoint.families.find import Found
from repconv_cli.checkpoint.families.words import eps_alone, notes
from repconv_cli.clock import Clock
from repconv_cli.diagnosis import first_difference_by_key, largest_error, looks_like
from repconv_cli.errors import InputError, RepconvError
from repconv_cli.graph.certificate import LIMIT
from repconv_cli.made import metadata
from repconv_cli.memory import large_blocks_again
from repconv_cli.opening import Opened, WeightsAlone
from repconv_cli.options import Options
from repconv_cli.results import InputFacts, OutputFacts, Result, Verification

_NO_INPUT = InputFacts((), (), False)


def fuse_alone(
    alone: WeightsAlone, out: str | Path, options: Options, clock: Clock, *, force: bool, dry_run: bool
) -> Result:
    """Write the weights in deploy form, each block proven and written before the next is made.

    With ``strict`` nothing is left under ``out``: weights alone are never checked as a whole.
    """
    alone, found = _recognised(alone, options)
    form = _deploy_form(alone, found, options, clock)
    verification = partial(found, options.eps)
    figures = {"certificate_limit": LIMIT, "blocks": len(found.blocks)}
    family = found.family.name, eps_alone(found, options.eps)
    with clock.phase("Fusing"), _one_core_left(), large_blocks_again():
        written = write_safetensors(
            out,
            form.planned,
            metadata(alone.facts, form.key_map(), verification, figures, family=family),
            force=force,
            source=alone.path,
            dry_run=dry_run or options.strict,
            make=lambda key: _made(form, key, alone.facts.name),
            release=alone.release,
        )
    return Result(
        "fuse",
        alone.facts,
        _NO_INPUT,
        form.facts(),
        (),
        totals_alone(found, alone.tensors, form.planned),
        replace(verification, float64=form.worst_error()),
        output=None if options.strict else OutputFacts(str(out), written.size_bytes, written.sha256, dry_run),
        notes=notes(found),
        drawing=form.drawing() if options.draw else None,
        seconds=clock.seconds,
    )


@contextmanager
def _one_core_left() -> Iterator[None]:
    """Leave one core to the threads that hash and write, while torch computes what they write next.

    With as many threads as cores, each short step of torch waits for the one whose core is taken.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(max(1, count - 1))
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _made(form: DeployForm, key: str, source: str) -> Tensor:
    """Return a tensor of ``form``; an error is of the source, not of the file that it is written to."""
    try:
        return form[key]
    except RepconvError as error:
        error.at(source)
        raise


def verify_alone(alone: WeightsAlone, written: Opened | WeightsAlone, options: Options, clock: Clock) -> Result:
    """Judge the tensors of a file in deploy form against the weights that it was made of."""
    alone, found = _recognised(alone, options)
    if options.eps is None and (eps := _eps_in(written)) not in (None, found.family.eps):
        options = replace(options, eps=eps)
    form = _deploy_form(alone, found, options, clock)
    tensors = written.tensors if isinstance(written, WeightsAlone) else written.tensors()
    with clock.phase("Fusing"):
        verification = judge_tensors(partial(found, options.eps), form, form.keys_by_block(), tensors)
    return Result(
        "verify",
        alone.facts,
        _NO_INPUT,
        verification=replace(verification, float64=form.worst_error()),
        notes=notes(found),
        drawing=form.drawing() if options.draw else None,
        seconds=clock.seconds,
    )


def _eps_in(written: Opened | WeightsAlone) -> float | None:
    found = written.metadata.get("repconv.eps")
    try:
        return None if found is None else float(found)
    except ValueError:
        raise InputError("its metadata gives an eps that is no number", where=written.facts.name) from None


def _deploy_form(alone: WeightsAlone, found: Found, options: Options, clock: Clock) -> DeployForm:
    eps = eps_alone(found, options.eps)
    return DeployForm(found, alone.tensors, lambda path: eps, options.seed, clock.report, draw=options.draw)


def judge_tensors(
    verification: Verification,
    expected: Mapping[str, Tensor],
    keys_by_block: Sequence[tuple[str, str]],
    found: Mapping[str, Tensor],
) -> Verification:
    """Return the verdict with what comparing the tensors of a file with ``expected`` adds to it."""
    verification = replace(verification, tensors_checked=len(expected))
    if set(expected) != set(found):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        parts = [f"it lacks {key}" for key in missing[:1]] + [
            f"it has {key}, which is not expected" for key in extra[:1]
        ]
        return replace(verification, verdict="fail", passed=False, looks_like=" and ".join(parts))
    difference = first_difference_by_key(keys_by_block, expected, found)
    if difference is None:
        return verification
    return replace(
        verification,
        verdict="fail",
        passed=False,
        first_bad_block=difference.block,
        looks_like=looks_like(difference),
        largest_error=largest_error(difference),
    )


def _recognised(alone: WeightsAlone, options: Options) -> tuple[WeightsAlone, Found]:
    """Return the weights under the names that their family's own model has, and what they hold."""
    _require_no_graph_options(options)
    try:
        found = recognise(alone.tensors)
    except InputError as error:
        if alone.is_torchscript:
            error.found = f"this is a TorchScript archive: its graph is code and is never run; {error.found}"
        raise
    prefix = found.family.prefix
    if prefix and alone.prefix.endswith(prefix):
        told = f"put {prefix!r} back: in {found.family.name} it is part of every name"
        facts = replace(alone.facts, notes=(*alone.facts.notes, told))
        named = {f"{prefix}{key}": tensor for key, tensor in alone.tensors.items()}
        return replace(alone, tensors=named, facts=facts), recognise(named)
    return alone, found


def _require_no_graph_options(options: Options) -> None:
    needs_graph = {
        "--target full": options.target == "full",
        "--input": bool(options.input),
        "--inputs": options.inputs is not None or options.example is not None,
        "--blocks": options.blocks is not None,
    }
    asked = [name for name, is_given in needs_graph.items() if is_given]
    if asked:
        raise InputError(
            f"{asked[0]} needs a graph, and weights alone hold none",
            hint="Give the architecture with --arch, or leave the option out.",
        )
