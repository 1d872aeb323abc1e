"""Each rule against onnxruntime: the fused file gives what the original gives, in as few operators as it can."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import repconv_cli
from tests.onnx.blocks import CASES, repvgg
from tests.onnx.graphs import assert_same, fuse, operators, save


@pytest.mark.parametrize("name", CASES)
def test_a_block_becomes_one_operator_and_gives_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before = case.make()
    after, result = fuse(before, tmp_path, input=case.shapes[0])
    assert operators(after) == case.left
    assert_same(before, after, *case.shapes)
    assert result.verification is not None
    assert result.verification.verdict == "pass"


@pytest.mark.parametrize("name", CASES)
def test_inspect_tells_what_fuse_leaves(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    told = repconv_cli.inspect(save(case.make(), tmp_path), input=case.shapes[0]).totals
    after, result = fuse(case.make(), tmp_path, input=case.shapes[0])
    assert result.totals is not None
    assert told is not None
    assert (told.convs, told.norms, told.ops) == (result.totals.convs, result.totals.norms, result.totals.ops)
    assert told.ops.after == sum(operators(after).values())


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 21, 22])
def test_a_block_is_fused_in_every_opset(opset: int, tmp_path: Path) -> None:
    before = repvgg(opset=opset)
    after, _ = fuse(before, tmp_path)
    assert operators(after) == {"Conv": 1, "Relu": 1}
    assert after.opset_import == before.opset_import
    assert_same(before, after, (2, 4, 9, 8))


def test_an_old_file_that_lists_constants_as_inputs_stays_one(tmp_path: Path) -> None:
    before = repvgg(opset=9, ir_version=3)
    for tensor in before.graph.initializer:
        value = before.graph.input.add()
        value.name = tensor.name
        value.type.tensor_type.elem_type = tensor.data_type
        for size in tensor.dims:
            value.type.tensor_type.shape.dim.add().dim_value = size
    after, _ = fuse(before, tmp_path)
    assert operators(after) == {"Conv": 1, "Relu": 1}
    assert {tensor.name for tensor in after.graph.initializer} == {value.name for value in after.graph.input} - {"x"}
    assert_same(before, after, (2, 4, 9, 8))


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    before = repvgg(dtype=np.float16)
    after, _ = fuse(before, tmp_path)
    assert {tensor.data_type for tensor in after.graph.initializer} == {10}
    assert_same(before, after, (2, 4, 9, 8), tolerance=4e-3)
