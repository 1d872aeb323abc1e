"""What is kept of a file, how it is written, and what is refused with one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import repconv_cli
from repconv_cli.errors import InputError, OutputError
from tests.onnx.blocks import repvgg
from tests.onnx.graphs import Graph, assert_same, external, fuse, operators, run, save


def with_surroundings() -> onnx.ModelProto:
    """A block between operators of every other kind."""
    g = Graph()
    before = g.node("Sigmoid", "x")
    dense, point = g.norm(g.conv(before)), g.conv(before, kernel=(1, 1))
    block = g.node("Add", dense, point)
    pooled = g.node("GlobalAveragePool", g.node("HardSigmoid", block, alpha=0.3))
    gate = g.node("Mul", block, pooled)
    return g.model(g.node("LeakyRelu", gate, alpha=0.2))


def test_what_is_not_fused_stays_byte_by_byte(tmp_path: Path) -> None:
    before = with_surroundings()
    after, _ = fuse(before, tmp_path)
    kept = [node.SerializeToString() for node in after.graph.node if node.op_type != "Conv"]
    assert kept == [
        n.SerializeToString() for n in before.graph.node if n.op_type not in ("Conv", "Add", "BatchNormalization")
    ]
    assert operators(after)["Conv"] == 1
    assert_same(before, after, (2, 4, 9, 8))


def test_names_texts_and_versions_are_kept(tmp_path: Path) -> None:
    before = with_surroundings()
    after, _ = fuse(before, tmp_path)
    for field in ("ir_version", "producer_name", "doc_string", "domain", "opset_import"):
        assert getattr(after, field) == getattr(before, field)
    assert (after.graph.name, after.graph.doc_string) == (before.graph.name, before.graph.doc_string)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    texts = {entry.key: entry.value for entry in after.metadata_props}
    assert {"author": "tests", "licence": "none"}.items() <= texts.items()
    assert texts["repconv.version"] == repconv_cli.__version__
    assert '"verdict": "pass"' in texts["repconv.verification"]


def test_a_fused_weight_takes_the_name_of_the_kernel_that_it_replaces(tmp_path: Path) -> None:
    after, _ = fuse(repvgg(), tmp_path)
    assert [tensor.name for tensor in after.graph.initializer] == ["conv0.weight", "conv0.bias"]


def test_a_block_whose_value_is_an_output_keeps_its_name(tmp_path: Path) -> None:
    g = Graph()
    before = g.model(g.norm(g.conv("x")))
    after, _ = fuse(before, tmp_path)
    assert [node.op_type for node in after.graph.node] == ["Conv"]
    assert_same(before, after, (2, 4, 9, 8))


def test_a_weight_that_two_operators_read_is_kept_for_the_other(tmp_path: Path) -> None:
    g = Graph()
    weight = g.noise(4, 4, 3, 3, name="shared.weight")
    one = g.node("Conv", "x", weight, pads=[1, 1, 1, 1])
    two = g.node("Conv", g.node("Relu", "x"), weight, pads=[1, 1, 1, 1])
    before = g.model(g.node("Relu", g.norm(one)), g.node("Relu", two))
    after, _ = fuse(before, tmp_path)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    np.testing.assert_array_equal(kept["shared.weight"], numpy_helper.to_array(before.graph.initializer[0]))
    assert_same(before, after, (2, 4, 9, 8))


def test_a_value_that_a_branch_reads_from_outside_is_not_taken_away(tmp_path: Path) -> None:
    g = Graph()
    inner = g.conv("x")
    y = g.norm(inner)

    def branch(op: str) -> onnx.GraphProto:
        given = [helper.make_tensor_value_info("given", 1, None)]
        return helper.make_graph([helper.make_node(op, [inner], ["given"])], op, [], given)

    flag = g.node("Greater", g.node("ReduceSum", "x", keepdims=0), g.constant(np.float32(0)))
    chosen = g.node("If", flag, then_branch=branch("Relu"), else_branch=branch("Neg"))
    before = g.model(g.node("Relu", y), chosen)
    after, _ = fuse(before, tmp_path)
    assert operators(after)["If"] == 1
    assert_same(before, after, (2, 4, 9, 8))


def test_a_local_function_is_kept_and_not_looked_into(tmp_path: Path) -> None:
    g = Graph()
    y = g.node("Twice", g.norm(g.conv("x")), domain="mine")
    before = g.model(g.node("Relu", y), domains=("mine",))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    before.functions.append(helper.make_function("mine", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    after, _ = fuse(before, tmp_path)
    assert operators(after) == {"Conv": 1, "Twice": 1, "Relu": 1}
    assert list(after.functions) == list(before.functions)
    assert_same(before, after, (2, 4, 9, 8))


def test_an_operator_that_no_runtime_knows_leaves_the_outputs_unchecked(tmp_path: Path) -> None:
    g = Graph(shape=(2, 4, 9, 8))
    y = g.node("Secret", g.norm(g.conv("x")), domain="mine", strength=3)
    before = g.model(g.node("Relu", y), domains=("mine",))
    after, result = fuse(before, tmp_path)
    assert operators(after) == {"Conv": 1, "Secret": 1, "Relu": 1}
    assert after.graph.node[1] == before.graph.node[2]
    assert result.verification is not None
    assert result.verification.verdict == "partial"
    assert "Secret" in result.verification.not_checked[-1]


def test_a_constant_that_the_caller_may_replace_is_none(tmp_path: Path) -> None:
    before = repvgg()
    value = before.graph.input.add()
    value.CopyFrom(helper.make_tensor_value_info("conv0.weight", 1, (4, 4, 3, 3)))
    after, _ = fuse(before, tmp_path)
    assert "conv0.weight" in {tensor.name for tensor in after.graph.initializer}
    assert operators(after)["Conv"] == 2
    assert_same(before, after, (2, 4, 9, 8))


def test_dead_operators_stay_and_those_that_fusing_leaves_behind_go(tmp_path: Path) -> None:
    g = Graph()
    g.node("Abs", "x")
    before = g.model(g.node("Relu", g.norm(g.conv("x"))))
    after, _ = fuse(before, tmp_path)
    assert operators(after) == {"Abs": 1, "Conv": 1, "Relu": 1}


def test_a_choice_is_compared_before_it_is_made(tmp_path: Path) -> None:
    g = Graph()
    flat = g.node("Reshape", g.norm(g.conv("x")), g.integers(0, -1))
    g.node("TopK", flat, g.integers(5), outputs=["best", "places"], axis=1)
    before = g.model("best")
    _, result = fuse(before, tmp_path)
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    assert "TopK" in result.verification.assumptions[0]


def test_tensors_in_another_file_go_into_one_other_file(tmp_path: Path) -> None:
    before = Graph(shape=("N", 32, 9, 8))
    model = before.model(before.node("Relu", before.norm(before.conv("x", 32, 32), 32)))
    expected = onnx.ModelProto.FromString(model.SerializeToString())
    source, out = external(model, tmp_path), tmp_path / "to" / "out.onnx"
    out.parent.mkdir()
    result = repconv_cli.fuse(source, out)
    model_name, data_name = sorted(os.listdir(out.parent), key=len)
    assert model_name == "out.onnx"
    assert data_name.startswith("out.onnx.")
    assert data_name.endswith(".data")
    assert out.stat().st_size < 2000
    assert_same(expected, onnx.load(out), (2, 32, 9, 8))
    assert result.output is not None
    assert result.output.size_bytes > 32 * 32 * 9 * 4
    assert repconv_cli.verify(source, out).verification


def test_overwriting_takes_the_old_tensors_away_only_when_the_new_model_stands(tmp_path: Path) -> None:
    def made(seed: float) -> Path:
        g = Graph(shape=("N", 32, 9, 8))
        scaled = g.node("Mul", g.conv("x", 32, 32), g.constant(np.float32(seed)))
        return external(g.model(g.node("Relu", g.norm(scaled, 32))), tmp_path)

    out = tmp_path / "out.onnx"
    repconv_cli.fuse(made(1.0), out)
    first = {p.name for p in tmp_path.glob("out.onnx.*.data")}
    repconv_cli.fuse(made(2.0), out, dry_run=True, force=True)
    assert {p.name for p in tmp_path.glob("out.onnx.*.data")} == first
    repconv_cli.fuse(made(2.0), out, force=True)
    second = {p.name for p in tmp_path.glob("out.onnx.*.data")}
    assert len(second) == 1
    assert second != first


def test_an_onnx_file_is_written_as_onnx_only(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"ends in \.onnx"):
        repconv_cli.fuse(save(repvgg(), tmp_path), tmp_path / "out.safetensors")


def test_neither_the_input_nor_another_file_is_overwritten(tmp_path: Path) -> None:
    source, other = save(repvgg(), tmp_path), tmp_path / "other.onnx"
    other.write_bytes(b"mine")
    with pytest.raises(OutputError, match="the output is the input"):
        repconv_cli.fuse(source, source, force=True)
    with pytest.raises(OutputError, match="exists already"):
        repconv_cli.fuse(source, other)
    assert other.read_bytes() == b"mine"


def test_without_the_libraries_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from repconv_cli.onnx import library

    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'repconv-cli\[onnx\]'"):
        repconv_cli.inspect(save(repvgg(), tmp_path))


def test_the_same_input_gives_the_same_file(tmp_path: Path) -> None:
    source = save(repvgg(), tmp_path)
    for name in ("a.onnx", "b.onnx"):
        repconv_cli.fuse(source, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        fuse(repvgg(), tmp_path)
    finally:
        os.umask(old)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o640


def test_the_helper_sees_a_difference() -> None:
    """The oracle of these tests fails a model that is not the same."""
    other = repvgg()
    scaled = numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1.001)
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(scaled, other.graph.initializer[0].name))
    assert run(other, np.zeros((1, 4, 9, 8), np.float32))[0].shape == (1, 4, 9, 8)
    with pytest.raises(AssertionError):
        assert_same(repvgg(), other, (1, 4, 9, 8))


def test_a_batch_that_is_declared_free_and_fixed_inside_is_proved_at_its_own_size(tmp_path: Path) -> None:
    graph = Graph(("N", 4, 5, 5))
    x = graph.node("Add", graph.norm(graph.conv("x")), graph.norm(graph.conv("x", kernel=(1, 1))))
    y = graph.node("Reshape", graph.node("Relu", x), graph.integers(2, 4, 25))
    # Its batch of two is known from the reshape alone.
    source = save(graph.model(y), tmp_path)
    result = repconv_cli.fuse(source, tmp_path / "out.onnx", input=(2, 4, 5, 5))
    assert result.verification is not None
    assert result.verification.passed
    assert operators(onnx.load(tmp_path / "out.onnx"))["Conv"] == 1
