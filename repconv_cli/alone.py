"""Weights alone: inspected, fused and verified block by block, with what cannot be known said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from repconv_cli.by_family import Deployed, deploy, partial, recognise, totals_alone
from repconv_cli.checkpoint.families.find import Found
from repconv_cli.checkpoint.families.words import eps_alone, notes
from repconv_cli.clock import Clock
from repconv_cli.diagnosis import first_difference_by_key, largest_error, looks_like
from repconv_cli.errors import InputError
from repconv_cli.made import Made, metadata
from repconv_cli.opening import Opened, WeightsAlone
from repconv_cli.options import Options
from repconv_cli.outputs import DeployForm
from repconv_cli.results import InputFacts, Result, Verification

_NO_INPUT = InputFacts((), (), False)


def fuse_alone(alone: WeightsAlone, options: Options, clock: Clock) -> Made:
    """Return the file's weights in deploy form, each block proven."""
    alone, found = _recognised(alone, options)
    deployed = _deployed(alone, found, options, clock)
    verification = partial(deployed, options.eps)
    result = Result(
        "fuse",
        alone.facts,
        _NO_INPUT,
        deployed.facts({key: tuple(tensor.shape) for key, tensor in alone.tensors.items()}),
        (),
        totals_alone(found, alone.tensors, deployed.tensors),
        verification,
        notes=notes(found),
        seconds=clock.seconds,
    )
    figures = {"worst_certificate": verification.float64 or 0.0, "blocks": len(deployed.folded)}
    family = found.family.name, eps_alone(found, options.eps)
    described = metadata(alone.facts, deployed.key_map(), verification, figures, family=family)
    return Made(result, DeployForm(deployed.tensors), described)


def verify_alone(alone: WeightsAlone, written: Opened | WeightsAlone, options: Options, clock: Clock) -> Result:
    """Judge the tensors of a file in deploy form against the weights that it was made of."""
    alone, found = _recognised(alone, options)
    if options.eps is None and "repconv.eps" in written.metadata and _eps_in(written) != found.family.eps:
        options = replace(options, eps=_eps_in(written))
    deployed = _deployed(alone, found, options, clock)
    tensors = written.tensors if isinstance(written, WeightsAlone) else written.tensors()
    return Result(
        "verify",
        alone.facts,
        _NO_INPUT,
        verification=judge_tensors(partial(deployed, options.eps), deployed, tensors),
        notes=notes(found),
        seconds=clock.seconds,
    )


def _eps_in(written: Opened | WeightsAlone) -> float:
    try:
        return float(written.metadata["repconv.eps"])
    except ValueError:
        raise InputError("its metadata gives an eps that is no number", where=written.facts.name) from None


def _deployed(alone: WeightsAlone, found: Found, options: Options, clock: Clock) -> Deployed:
    eps = eps_alone(found, options.eps)
    with clock.phase("Fusing"):
        return deploy(found, alone.tensors, lambda path: eps, options.seed, clock.report)


def judge_tensors(verification: Verification, deployed: Deployed, found: Mapping[str, Tensor]) -> Verification:
    """Return the verdict with what comparing the tensors of a file with those of ``deployed`` adds to it."""
    expected = deployed.tensors
    verification = replace(verification, tensors_checked=len(expected))
    if set(expected) != set(found):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        parts = [f"it lacks {key}" for key in missing[:1]] + [
            f"it has {key}, which is not expected" for key in extra[:1]
        ]
        return replace(verification, verdict="fail", passed=False, looks_like=" and ".join(parts))
    by_block = [(fold.block.name, key) for fold in deployed.folded for key in fold.keys]
    difference = first_difference_by_key(by_block, expected, found)
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
