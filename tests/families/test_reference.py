"""Weights alone become what their repository's deploy class loads: key for key, with equal outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from repconv_cli import convert
from repconv_cli.options import Options
from repconv_cli.results import Result
from tests.families.reference import CASES, Case, assert_equal_outputs, drawn

every_case = pytest.mark.parametrize("case", CASES, ids=[case.family for case in CASES])


def fused(case: Case, folder: Path, **options: Any) -> tuple[nn.Module, Result, Path]:
    model = drawn(case.training(), case.eps)
    path = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    out = folder / "deploy.safetensors"
    return model, convert.fuse(path, out, Options(**options)), out


@every_case
def test_the_deploy_class_loads_the_file_strictly_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    model, result, out = fused(case, tmp_path)
    deploy = case.deploy()
    deploy.load_state_dict(load_file(out), strict=True)
    assert_equal_outputs(model, deploy, case.channels)
    assert result.notes[0] == f"known by its keys: {case.family}"
    assert all(block.certificate is not None and block.certificate["error"] < 1e-12 for block in result.blocks)


@every_case
def test_the_verdict_is_partial_and_says_what_was_assumed(case: Case, tmp_path: Path) -> None:
    _, result, out = fused(case, tmp_path)
    verification = result.verification
    assert verification is not None
    assert (verification.verdict, verification.passed, verification.max_abs) == ("partial", True, None)
    assert f"every norm has eps {case.eps:g} (as {case.family} uses it; --eps sets it)" in verification.assumptions
    assert verification.not_checked
    assert result.totals is not None
    assert result.totals.macs.before is None
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["repconv.target"] == "deploy"
    assert metadata["repconv.family"] == case.family
    assert float(metadata["repconv.eps"]) == case.eps
    assert "repconv.graph" not in metadata
    key_map = json.loads(metadata["repconv.key_map"])
    assert {key for block in result.blocks for key in block.sources} == {k for keys in key_map.values() for k in keys}


@every_case
def test_a_fused_file_stays_as_it_is(case: Case, tmp_path: Path) -> None:
    _, _, out = fused(case, tmp_path)
    again = convert.fuse(out, tmp_path / "again.safetensors", Options())
    assert again.blocks == ()
    assert "nothing to fuse" in again.notes[-1]
    assert again.exit_code(strict=False) == 0
    assert again.exit_code(strict=True) == 1
    before, after = load_file(out), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@every_case
def test_inspect_promises_what_fuse_delivers(case: Case, tmp_path: Path) -> None:
    _, delivered, _ = fused(case, tmp_path)
    promised = convert.inspect(tmp_path / "weights.safetensors", Options())
    told = [(block.name, block.kind, block.sources, block.target, block.weight_shape) for block in promised.blocks]
    assert told == [(b.name, b.kind, b.sources, b.target, b.weight_shape) for b in delivered.blocks]
    changes = [block.params for block in promised.blocks]
    assert changes == [block.params for block in delivered.blocks]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_folded_in_float64_and_cast_once(dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[0]
    model = drawn(case.training(), case.eps).to(dtype)
    save_file(model.state_dict(), tmp_path / "half.safetensors")
    convert.fuse(tmp_path / "half.safetensors", tmp_path / "out.safetensors", Options())
    exact = model.double()
    save_file(exact.state_dict(), tmp_path / "exact.safetensors")
    convert.fuse(tmp_path / "exact.safetensors", tmp_path / "double.safetensors", Options())
    half, double = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "double.safetensors")
    assert all(torch.equal(half[key], double[key].to(dtype)) for key in half)


def test_eps_is_the_users_to_set_and_changes_the_tensors(tmp_path: Path) -> None:
    case = CASES[0]
    model = drawn(case.training(), 1e-2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    result = convert.fuse(tmp_path / "weights.safetensors", tmp_path / "out.safetensors", Options(eps=1e-2))
    assert result.verification is not None
    assert "every norm has eps 0.01 (not the family's own)" in result.verification.assumptions
    deploy = case.deploy()
    deploy.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert_equal_outputs(model, deploy, case.channels)


def test_verify_sees_another_eps_and_a_changed_tensor(tmp_path: Path) -> None:
    _, _, out = fused(CASES[0], tmp_path)
    source = tmp_path / "weights.safetensors"
    right = convert.verify(source, out, Options()).verification
    assert right is not None
    assert (right.verdict, right.tensors_checked) == ("partial", 6)
    other = convert.verify(source, out, Options(eps=1e-3)).verification
    assert other is not None
    assert (other.verdict, other.first_bad_block) == ("fail", "stage0")
    assert "another norm eps" in (other.looks_like or "")
    tensors = load_file(out)
    tensors["stage1.rbr_reparam.weight"][0] *= -1
    with safe_open(out, "pt") as file:
        save_file(tensors, tmp_path / "wrong.safetensors", file.metadata())
    wrong = convert.verify(source, tmp_path / "wrong.safetensors", Options()).verification
    assert wrong is not None
    assert (wrong.verdict, wrong.first_bad_block) == ("fail", "stage1")


def test_verify_sees_a_missing_key(tmp_path: Path) -> None:
    _, _, out = fused(CASES[0], tmp_path)
    tensors = load_file(out)
    del tensors["stage1.rbr_reparam.bias"]
    with safe_open(out, "pt") as file:
        save_file(tensors, tmp_path / "wrong.safetensors", file.metadata())
    wrong = convert.verify(tmp_path / "weights.safetensors", tmp_path / "wrong.safetensors", Options()).verification
    assert wrong is not None
    assert (wrong.verdict, wrong.looks_like) == ("fail", "it lacks stage1.rbr_reparam.bias")
