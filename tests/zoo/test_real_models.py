"""Model classes of timm, transformers, ultralytics and torchvision, fused from their data flow alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo import CATALOGUE
from repconv_cli.facts import totals
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.program import Program, ProgramModule
from tests.zoo.conftest import FusedModel

CERTIFICATE_LIMIT = 1e-12
WHOLE_MODEL_LIMIT = 1e-11
# Of the range, in float32: a wrong block is off by 1e-2 and more, rounding of these nets by 1e-4 at most.
ROUNDING = 1e-3


def test_every_block_is_proven(fused_model: FusedModel):
    errors = [certificate.error for certificate in fused_model.fused.certificates]
    assert len(errors) == len(fused_model.fused.plan.blocks) > 0
    assert max(errors) <= CERTIFICATE_LIMIT


def test_whole_model_is_exact_in_float64(fused_model: FusedModel):
    assert fused_model.fused.float64_error <= WHOLE_MODEL_LIMIT


def test_outputs_are_those_of_the_library_class_within_rounding(fused_model: FusedModel):
    """Not the traced graph but the class itself is the oracle, on other data than the proof's."""
    model = fused_model.model
    args, kwargs = model.example(seed=7)
    with torch.no_grad():
        expected = model.judged(fused_model.module(*args, **kwargs))
        found = model.judged(ProgramModule(fused_model.fused.program)(*args, **kwargs))
    assert len(expected) == len(found) > 0
    for a, b in zip(expected, found, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(b, a, rtol=0, atol=ROUNDING * float(a.abs().max()))


def test_no_more_is_left_than_by_the_library_or_by_hand(fused_model: FusedModel):
    left, own = count_ops(fused_model.fused.program), fused_model.own_counts()
    if own is not None:
        assert {what: left[what] <= own[what] for what in own} == dict.fromkeys(own, True), (left, own)
    if fused_model.model.convs_by_hand is not None:
        assert left["convs"] <= fused_model.model.convs_by_hand
    assert left["norms"] == fused_model.model.norms_left


def test_told_counts_are_those_of_what_is_written(fused_model: FusedModel):
    told, written = totals(fused_model.fused.plan), fused_model.fused.program
    counted = count_ops(written) | {"params": sum(written.tensors[key].numel() for key in written.parameters)}
    assert {name: getattr(told, name).after for name in counted} == counted


def test_told_work_is_what_torch_counts(fused_model: FusedModel):
    told = totals(fused_model.fused.plan).macs
    counted = [_counted_macs(fused_model, program) for program in (fused_model.program, fused_model.fused.program)]
    # Torch does not count a product with a vector (D-FINE has some: a millionth of its work).
    assert [told.before, told.after] == pytest.approx(counted, rel=1e-5)


def _counted_macs(fused_model: FusedModel, program: Program) -> float:
    args, kwargs = fused_model.model.example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ProgramModule(program)(*args, **kwargs)
    return counter.get_total_flops() / (2 * program.samples())


def test_source_model_and_graph_are_unchanged(fused_model: FusedModel):
    state = fused_model.module.state_dict()
    assert state.keys() == fused_model.state_before.keys()
    for key, tensor in fused_model.state_before.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0, equal_nan=True)
    assert str(fused_model.program.graph) == fused_model.code_before


def test_catalogue_names_each_model_once():
    names = [model.name for model in CATALOGUE]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("library", ["timm", "transformers", "ultralytics", "torchvision"])
def test_every_library_is_tested(library: str):
    assert any(model.in_tests and model.name.startswith(f"{library}:") for model in CATALOGUE)
