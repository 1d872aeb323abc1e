"""``verify`` on ONNX files: a correct one passes, each kind of wrong answer fails, and refusals give their reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import repconv_cli
from repconv_cli.errors import InputError
from tests.cli.runs import run as run_command
from tests.onnx.blocks import repvgg
from tests.onnx.graphs import Graph, fuse, save


def changed(model: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray], position: int = 0) -> onnx.ModelProto:
    """Return a copy with one of its constants changed."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = made.graph.initializer[position]
    value = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return made


def one_channel(weight: np.ndarray) -> np.ndarray:
    weight[2] *= 1.01
    return weight


def not_a_number(weight: np.ndarray) -> np.ndarray:
    weight[0, 0, 0, 0] = np.nan
    return weight


WRONG: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "twice the kernel": lambda m: changed(m, lambda w: 2 * w),
    "a sign": lambda m: changed(m, lambda w: -w),
    "a shifted kernel": lambda m: changed(m, lambda w: np.roll(w, 1, axis=3)),
    "swapped channels": lambda m: changed(m, lambda w: w[[1, 0, 2, 3]]),
    "one wrong channel": lambda m: changed(m, one_channel),
    "NaN": lambda m: changed(m, not_a_number),
    "a bias that is lost": lambda m: changed(m, np.zeros_like, 1),
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx.ModelProto]:
    folder = tmp_path_factory.mktemp("verify")
    model, _ = fuse(repvgg(), folder)
    return folder / "in.onnx", model


def test_a_correct_file_passes_and_its_tensors_are_those_of_a_new_plan(
    fused: tuple[Path, onnx.ModelProto], tmp_path: Path
) -> None:
    source, model = fused
    verification = repconv_cli.verify(source, save(model, tmp_path)).verification
    assert verification is not None
    assert verification.verdict == "pass"
    assert verification.tensors_checked == 2
    assert verification.float64 is not None
    assert verification.float64 < 1e-5


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails(name: str, fused: tuple[Path, onnx.ModelProto], tmp_path: Path) -> None:
    source, model = fused
    verification = repconv_cli.verify(source, save(WRONG[name](model), tmp_path)).verification
    assert verification is not None
    assert verification.verdict == "fail"
    assert run_command("verify", source, tmp_path / "in.onnx").exit_code == 1


def test_a_wrong_border_fails(fused: tuple[Path, onnx.ModelProto], tmp_path: Path) -> None:
    """Right inside, wrong in one border row: pads of the convolution moved from one side to the other."""
    source, model = fused
    made = onnx.ModelProto.FromString(model.SerializeToString())
    convolution = next(node for node in made.graph.node if node.op_type == "Conv")
    pads = next(attribute for attribute in convolution.attribute if attribute.name == "pads")
    pads.CopyFrom(helper.make_attribute("pads", [2, 1, 0, 1]))
    verification = repconv_cli.verify(source, save(made, tmp_path)).verification
    assert verification is not None
    assert verification.verdict == "fail"


def test_another_call_is_refused(fused: tuple[Path, onnx.ModelProto], tmp_path: Path) -> None:
    source, _ = fused
    other = Graph()
    path = save(other.model(other.node("Relu", "x")), tmp_path)
    with pytest.raises(InputError, match="its inputs and outputs are"):
        repconv_cli.verify(source, path)


def refused(make: Callable[[Graph], str]) -> onnx.ModelProto:
    g = Graph()
    return g.model(g.node("Relu", make(g)))


REFUSALS: dict[str, tuple[onnx.ModelProto, str]] = {
    "activation between": (
        refused(lambda g: g.node("Add", g.conv("x"), g.node("Relu", "x"))),
        "no common linear source",
    ),
    "squeeze and excite": (
        refused(lambda g: g.node("Mul", g.conv("x"), g.node("Sigmoid", g.node("GlobalAveragePool", "x")))),
        "depends on the input",
    ),
    "training mode": (
        refused(lambda g: g.norm(g.conv("x"), training_mode=1, outputs=["y", "running_mean", "running_var"])),
        "",
    ),
    "pool that leaves padding uncounted": (
        refused(
            lambda g: g.node("Add", g.conv("x"), g.node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
        ),
        "leaves padding uncounted",
    ),
    "more work": (
        refused(lambda g: g.conv(g.conv("x", group=4, bias=False), kernel=(1, 1), pads=[0, 0, 0, 0])),
        "times the work",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_near_miss_is_left_byte_by_byte_with_its_reason(name: str, tmp_path: Path) -> None:
    before, reason = REFUSALS[name]
    after, result = fuse(before, tmp_path)
    assert [n.SerializeToString() for n in after.graph.node] == [n.SerializeToString() for n in before.graph.node]
    assert list(after.graph.initializer) == list(before.graph.initializer)
    assert not result.blocks
    assert not reason or any(reason in refusal.reason for refusal in result.refusals)


def test_inspect_counts_what_fuse_leaves(tmp_path: Path) -> None:
    source = save(repvgg(), tmp_path)
    planned = repconv_cli.inspect(source).totals
    made = repconv_cli.fuse(source, tmp_path / "out.onnx").totals
    assert planned is not None
    assert made is not None
    assert planned.convs == made.convs
    assert planned.ops == made.ops
    assert (made.convs.before, made.convs.after, made.norms.after) == (2, 1, 0)
