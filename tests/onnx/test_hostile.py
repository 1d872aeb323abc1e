"""Files that nobody vouches for: each refusal is one line and exit code 2; nothing outside of the folder is read."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import repconv_cli
from repconv_cli.errors import DamagedFileError, UnsafeFileError
from tests.cli.runs import run as run_command
from tests.onnx.blocks import repvgg
from tests.onnx.graphs import Graph, external


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:\\secret", "", "~/secret", "a//b"]
)
def test_tensors_outside_of_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(10_000))
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(repvgg(), folder)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UnsafeFileError, match="outside of its folder"):
        repconv_cli.inspect(path)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(repvgg(), folder)
    data = folder / "in.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="behind a link"):
        repconv_cli.inspect(path)


def test_a_pipe_for_a_tensor_file_is_never_opened(tmp_path: Path) -> None:
    path = external(repvgg(), tmp_path)
    (tmp_path / "in.onnx.data").unlink()
    os.mkfifo(tmp_path / "in.onnx.data")
    with pytest.raises(UnsafeFileError, match="no ordinary file"):
        repconv_cli.inspect(path)


def test_a_tensor_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = external(repvgg(), tmp_path)
    os.truncate(tmp_path / "in.onnx.data", 100)
    with pytest.raises(DamagedFileError, match="claims bytes"):
        repconv_cli.inspect(path)


def huge() -> bytes:
    """A tensor of 2^60 values that holds none."""
    model = repvgg()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend([1 << 30, 1 << 30, 1, 1])
    return model.SerializeToString()


def too_few_values() -> bytes:
    model = repvgg()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return model.SerializeToString()


def a_cycle() -> bytes:
    model = repvgg()
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    return model.SerializeToString()


def made_twice() -> bytes:
    model = repvgg()
    model.graph.node[1].output[0] = model.graph.node[0].output[0]
    return model.SerializeToString()


def all_memory() -> bytes:
    g = Graph()
    large = g.node("ConstantOfShape", g.integers(1 << 20, 1 << 20))
    return g.model(g.node("Add", "x", g.node("ReduceSum", large))).SerializeToString()


def no_output() -> bytes:
    model = repvgg()
    del model.graph.output[:]
    return model.SerializeToString()


def no_opset() -> bytes:
    model = repvgg()
    del model.opset_import[:]
    return model.SerializeToString()


def old_opset() -> bytes:
    return repvgg(opset=6).SerializeToString()


def text_input() -> bytes:
    model = repvgg()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    return model.SerializeToString()


def random_numbers() -> bytes:
    g = Graph()
    return g.model(g.node("Add", "x", g.node("RandomNormalLike", "x"))).SerializeToString()


def wrong_kernel() -> bytes:
    model = repvgg()
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("pads", [1 << 40] * 4))
    return model.SerializeToString()


DAMAGED = (
    huge, too_few_values, a_cycle, made_twice, no_output, no_opset, old_opset, text_input, random_numbers, wrong_kernel,
    all_memory,
)  # fmt: skip


@pytest.mark.parametrize("make", DAMAGED)
def test_a_damaged_file_ends_with_one_line(make, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(make())
    done = run_command("fuse", path, tmp_path / "out.onnx")
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line and not line.endswith("…")]
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert os.listdir(tmp_path) == ["in.onnx"]


@pytest.mark.parametrize("count", [10, 40, 300, 900])
def test_a_file_that_is_cut_short_ends_with_one_line(count: int, tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(repvgg().SerializeToString()[:count])
    done = run_command("inspect", path)
    assert done.exit_code == 2, done.output
