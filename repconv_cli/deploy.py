"""The deploy form of a model whose graph is known: the family's blocks, found again in the graph and proven there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from repconv_cli.alone import judge_tensors
from repconv_cli.by_family import DeployForm, recognise
from repconv_cli.checkpoint.families.find import Found
from repconv_cli.checkpoint.families.shapes import main_layer
from repconv_cli.checkpoint.families.words import notes
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.clock import Clock
from repconv_cli.drawing import with_drawing
from repconv_cli.errors import InputError
from repconv_cli.facts import block_facts, input_facts, totals
from repconv_cli.full import compare_outputs, figures
from repconv_cli.graph.analyse import is_norm
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.given import GivenBlock, Placed, place_blocks
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.made import Made, metadata
from repconv_cli.opening import Opened, WeightsAlone
from repconv_cli.options import Options
from repconv_cli.outputs import TensorsOutput
from repconv_cli.results import Result, Verification
from repconv_cli.verdict import proof_inputs

_FULL = "--target full fuses all that the graph allows, whatever its names."


@dataclass(frozen=True)
class _Deployed:
    """The form, and all its tensors."""

    form: DeployForm
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _InGraph:
    """A model in deploy form: its tensors, and the graph that reads them."""

    deployed: _Deployed
    placed: Placed
    fused: Fused


def inspect_deploy(opened: Opened, program: Program, is_guessed: bool, options: Options, clock: Clock) -> Result:
    """Return what the family's deploy class fuses."""
    with clock.phase("Analysing"):
        deployed, placed = _placed(opened, program, options, clock)
    result = Result(
        "inspect",
        opened.facts,
        input_facts(program, is_guessed),
        tuple(block_facts(block) for block in placed.plan.blocks),
        totals=totals(placed.plan, placed.fusions),
        notes=(*program.notes, *notes(deployed.form.found)),
        seconds=clock.seconds,
    )
    return with_drawing(result, placed.plan, clock.report) if options.draw else result


def fuse_deploy(opened: Opened, program: Program, is_guessed: bool, options: Options, clock: Clock) -> Made:
    """Return what the family's deploy class loads, proven on the model's own graph."""
    made = _in_graph(opened, program, options, clock)
    with clock.phase("Verifying"):
        final = made.fused.program
        verification = _with_unchecked(
            compare_outputs(program, opened.module, final, ProgramModule(final), options, clock.report), made.placed
        )
    unsaved = sorted(set(final.tensors) - set(made.deployed.tensors))
    told = [*program.notes, *notes(made.deployed.form.found)]
    if unsaved:
        told.append(f"the file holds no graph: it would need {unsaved[0]}, which the deploy class does not save")
    result = Result(
        "fuse",
        opened.facts,
        input_facts(program, is_guessed),
        tuple(block_facts(b, proof) for b, proof in zip(made.fused.plan.blocks, made.fused.certificates, strict=True)),
        (),
        totals(made.fused.plan, made.fused.fusions),
        verification,
        notes=tuple(told),
        seconds=clock.seconds,
    )
    if options.draw:
        result = with_drawing(result, made.placed.plan, clock.report)
    graph = None if unsaved else to_json(final)
    if graph is not None:
        # What cannot be read back must not be written.
        from_json(graph, final.tensors)
    described = metadata(
        opened.facts,
        made.deployed.form.key_map(),
        verification,
        figures(made.fused),
        graph=graph,
        family=(made.deployed.form.found.family.name, None),
    )
    return Made(result, TensorsOutput(made.deployed.tensors), described)


def verify_deploy(
    opened: Opened,
    program: Program,
    is_guessed: bool,
    written: Opened | WeightsAlone,
    options: Options,
    clock: Clock,
) -> Result:
    """Judge a file in deploy form: the outputs that its tensors give, and each tensor against a new plan."""
    made = _in_graph(opened, program, options, clock)
    found = written.tensors if isinstance(written, WeightsAlone) else written.tensors()
    with clock.phase("Comparing outputs"):
        final = made.fused.program
        fitting = all(found[key].shape == t.shape for key, t in final.tensors.items() if key in found)
        stored = replace(final, tensors={key: found.get(key, tensor) for key, tensor in final.tensors.items()})
        judged = stored if fitting else final
        verification = compare_outputs(program, opened.module, judged, ProgramModule(judged), options, clock.report)
        verification = judge_tensors(
            _with_unchecked(verification, made.placed),
            made.deployed.tensors,
            made.deployed.form.keys_by_block(),
            found,
        )
    result = Result(
        "verify",
        opened.facts,
        input_facts(program, is_guessed),
        verification=verification,
        notes=(*program.notes, *notes(made.deployed.form.found)),
        seconds=clock.seconds,
    )
    return with_drawing(result, made.placed.plan, clock.report) if options.draw else result


def _in_graph(opened: Opened, program: Program, options: Options, clock: Clock) -> _InGraph:
    with clock.phase("Fusing"):
        deployed, placed = _placed(opened, program, options, clock)
        fused = fuse_program(
            program,
            proof_inputs(program, options.seed),
            dtype=program.dtype(),
            seed=options.seed,
            progress=clock.report,
            planner=lambda unproven: (placed.plan, placed.fusions),
        )
    return _InGraph(deployed, placed, fused)


def _placed(opened: Opened, program: Program, options: Options, clock: Clock) -> tuple[_Deployed, Placed]:
    if options.blocks is not None:
        raise InputError("--blocks with --target deploy: the deploy class needs every block fused", hint=_FULL)
    tensors = opened.tensors()
    found = _recognised(tensors)
    known = eps_in(program)

    def eps(path: str) -> float:
        return known.get(path, found.family.eps)

    form = DeployForm(found, tensors, eps, options.seed, clock.report, keeps_float64=True)
    deployed = _Deployed(form, dict(form))
    placed = place_blocks(program, _given(form), frozenset(tensors), options.seed)
    if placed.plan.refusals:
        first = placed.plan.refusals[0]
        raise InputError(
            f"block {quoted(first.name)} has the names of {found.family.name}, and is not computed like it in this "
            f"model: {first.reason}",
            hint=_FULL,
        )
    return deployed, placed


def _recognised(tensors: dict[str, Tensor]) -> Found:
    try:
        return recognise(tensors)
    except InputError as error:
        raise InputError(f"--target deploy: {error.found}", needed="keys of a known family", hint=_FULL) from None


def _given(form: DeployForm) -> list[GivenBlock]:
    return [
        GivenBlock(
            fold.block.name,
            fold.block.target,
            frozenset(fold.block.sources),
            f"{main_layer(fold.block.part).path}.weight",
            fold.tensors,
        )
        for fold in form.folded
        if fold.facts is not None
    ]


def eps_in(program: Program) -> dict[str, float]:
    """Return the eps of each norm in a graph, by the path of its statistics."""
    found = {}
    for node in program.graph.nodes:
        if is_norm(node) and isinstance(node.args[4], fx.Node) and node.args[4].op == "get_attr":
            found[str(node.args[4].target).rpartition(".")[0]] = float(node.args[7])
    return found


def _with_unchecked(verification: Verification, placed: Placed) -> Verification:
    if not placed.missing:
        return verification
    reason = (
        f"the outputs do not depend on {listed(placed.missing, most=3)}: proven as blocks, not as parts of the model"
    )
    verdict = "partial" if verification.verdict == "pass" else verification.verdict
    return replace(verification, verdict=verdict, not_checked=(*verification.not_checked, reason))
