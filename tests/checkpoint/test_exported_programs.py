"""torch.export programs: the same tensors as torch reads, the graph as plain data, and hostile archives."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from repconv_cli.checkpoint import FileFormat, read
from repconv_cli.checkpoint.program import FreeSize, ProgramFile, TorchConstant, ValueRef
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError
from tests.checkpoint.hostile_files import Calls, zip_file
from tests.checkpoint.tensor_checks import randomised


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.two.weight = self.one.weight
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.register_buffer("shift", torch.ones(4, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, *, flag: bool = True) -> dict[str, Any]:
        z = torch.relu(self.norm(self.conv(x))) * self.scale + self.shift
        z = self.one(z) + self.two(z) + torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]])
        first, second = z.split([1, 3], 1)
        return {"a": first, "b": (second.view(z.shape[0], -1), y.to(torch.float64)), "c": z.masked_fill(z > 9, -1e999)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    batch = torch.export.Dim("batch")
    args = (torch.rand(2, 3, 8, 8), torch.rand(2, 3))
    program = torch.export.export(
        randomised(Net()).eval(), args, {"flag": False}, dynamic_shapes=({0: batch}, {0: batch}, None), strict=False
    )
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def program(exported: Path) -> ProgramFile:
    source = read(exported)
    assert (source.kind, source.format) == ("program", FileFormat.EXPORTED)
    assert source.program is not None
    return source.program


def test_tensors_have_the_bits_torch_reads(exported: Path, program: ProgramFile) -> None:
    loaded = torch.export.load(exported)
    wanted = {**loaded.state_dict, **loaded.constants}
    assert set(program.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert program.tensors[name].dtype == tensor.dtype
        assert torch.equal(program.tensors[name], tensor), name


def test_tied_weights_share_memory(program: ProgramFile) -> None:
    assert program.tensors["one.weight"].data_ptr() == program.tensors["two.weight"].data_ptr()


def test_nodes_are_the_calls_of_the_exported_graph(exported: Path, program: ProgramFile) -> None:
    graph = torch.export.load(exported).graph
    # Picking one of several outputs is no call in the file.
    calls = [n for n in graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
    assert [node.name for node in program.nodes] == [call.name for call in calls]
    assert [node.target.removeprefix("torch.ops.") for node in program.nodes] == [str(call.target) for call in calls]
    by_name = {node.name: node for node in program.nodes}
    conv = by_name["conv2d"]
    assert conv.module_path == "conv"
    assert {a.name: a.value for a in conv.arguments} == {
        "input": ValueRef("x"), "weight": ValueRef("p_conv_weight"), "bias": ValueRef("p_conv_bias"),
        "stride": [1, 1], "padding": [1, 1],
    }  # fmt: skip
    split = next(node for node in program.nodes if "split" in node.target)
    assert split.returns_list
    assert isinstance(split.outputs[0], tuple)
    assert len(split.outputs[0]) == 2
    values = [a.value for node in program.nodes for a in node.arguments]
    assert TorchConstant("dtype", "float64") in values
    assert float("-inf") in values


def test_inputs_are_bound_and_shapes_are_told(program: ProgramFile) -> None:
    bound = {item.name: (item.kind, item.key, item.persistent) for item in program.inputs}
    assert bound["p_conv_weight"] == ("parameter", "conv.weight", True)
    assert bound["b_shift"] == ("buffer", "shift", False)
    assert "constant" in {item.kind for item in program.inputs}
    (x, x_shape), (y, y_shape) = program.user_inputs
    assert (x, y) == ("x", "y")
    assert x_shape.dtype == "float32"
    assert x_shape.sizes[1:] == (3, 8, 8)
    free = x_shape.sizes[0]
    assert isinstance(free, FreeSize)
    assert free == y_shape.sizes[0]
    assert free.hint == 2
    assert set(program.ranges) == set(free.expression.symbols())
    assert [item.value for item in program.inputs if item.kind == "fixed"] == [False]
    assert program.argument_names[:2] == ("x", "y")


def test_nested_outputs_are_described(program: ProgramFile) -> None:
    assert program.out_spec["type"] == "builtins.dict"
    assert program.out_spec["context"] == ["a", "b", "c"]
    assert len(program.outputs) == 4
    assert program.buffer_updates == {}


def test_a_norm_in_training_mode_lists_its_buffer_updates(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    exported = torch.export.export(model, (torch.rand(2, 3, 4, 4),)).run_decompositions({})
    torch.export.save(exported, tmp_path / "m.pt2")
    program = read(tmp_path / "m.pt2").program
    assert program is not None
    assert "1.running_mean" in program.buffer_updates


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    model = randomised(nn.Linear(3, 4)).to(dtype)
    torch.export.save(torch.export.export(model, (torch.rand(2, 3).to(dtype),)), tmp_path / "m.pt2")
    program = read(tmp_path / "m.pt2").program
    assert program is not None
    for name, tensor in model.state_dict().items():
        assert torch.equal(program.tensors[name], tensor)


# -- hostile archives ------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], None]
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
MODEL = "models/model.json"


def edited(exported: Path, target: Path, member: str, edit: Edit, extra: dict[str, bytes] | None = None) -> Path:
    """Write the program again with one JSON member changed."""
    with zipfile.ZipFile(exported) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in members if name.endswith(member)]
    content = json.loads(members[name])
    edit(content)
    members[name] = json.dumps(content).encode()
    folder = name.removesuffix(member)
    return zip_file(target, members | {folder + key: value for key, value in (extra or {}).items()})


def size_of(content: dict[str, Any]) -> dict[str, Any]:
    expression: dict[str, Any] = content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]
    return expression


def first(content: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = content["graph_module"]["graph"]["nodes"][1]
    return node


def setting(*path: Any, value: Any) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


GRAPH = ("graph_module", "graph")
W = ("config", "conv.weight")
OPAQUE = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
META = (*W, "tensor_meta")
PAYLOAD = "__import__('os').mkdir('marker')"

HOSTILE = [
    ("pickled weight", WEIGHTS, setting(*W, "use_pickle", value=True), UnsafeFileError, "conv.weight"),
    ("opaque constant", CONSTANTS, setting("config", "evil", value=OPAQUE), UnsafeFileError, "opaque objects: evil"),
    ("no geometry", WEIGHTS, setting(*META, value=None), UnsafeFileError, "pickled or opaque"),
    ("code as a size", MODEL, lambda c: size_of(c).update(expr_str=PAYLOAD), InputError, "not a plain expression"),
    ("code in a size", MODEL, lambda c: size_of(c).update(expr_str=f"Symbol({PAYLOAD})"), InputError, "not a plain"),
    ("code as a range", MODEL, setting("range_constraints", PAYLOAD, value={"min_val": 0, "max_val": 1}),
     InputError, "not a plain expression"),
    ("opaque value", MODEL, setting(*GRAPH, "custom_obj_values", value={"o": {}}), UnsafeFileError, "objects: o"),
    ("sub-graph", MODEL, lambda c: first(c)["inputs"][0].update(arg={"as_graph": {}}), InputError, "as_graph"),
    ("custom object", MODEL, lambda c: first(c)["inputs"][0].update(arg={"as_custom_obj": {}}), InputError, "custom"),
    ("unknown field", MODEL, setting("e\x1b[31mvil", value=1), InputError, r"unknown field"),
    ("version", MODEL, setting("schema_version", "major", value=9), InputError, "version 9; needed: version 8"),
    ("two values", MODEL, lambda c: first(c)["inputs"][0]["arg"].update(as_int=1), DamagedFileError, "with 2 values"),
    ("no value", MODEL, lambda c: first(c)["inputs"][0].update(arg={}), DamagedFileError, "with 0 values"),
    ("unknown value", MODEL, lambda c: first(c)["inputs"][0].update(arg={"as_tensor": {"name": "later"}}),
     DamagedFileError, "uses the value later before"),
    ("defined twice", MODEL, lambda c: c["graph_module"]["graph"]["nodes"].append(first(c)), DamagedFileError, "twice"),
    ("text as a number", MODEL, lambda c: first(c)["inputs"][0].update(kind="x"), InputError, "schema"),
    ("weight claims more", WEIGHTS, setting(*META, "sizes", 0, value={"as_int": 99}), DamagedFileError, "at most 108"),
    ("stride-0 giant", WEIGHTS, lambda c: c["config"]["conv.weight"]["tensor_meta"].update(
        sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]), DamagedFileError, "claims 1099511627776 elements"),
    ("negative stride", WEIGHTS, setting(*META, "strides", 0, value={"as_int": -1}), DamagedFileError, "negative"),
    ("offset", WEIGHTS, setting(*META, "storage_offset", value={"as_int": 1}), DamagedFileError, "at most 108"),
    ("free size", WEIGHTS, setting(*META, "sizes", 0, value={"as_expr": {"expr_str": "s0"}}), DamagedFileError, "free"),
    ("dtype", WEIGHTS, setting(*META, "dtype", value=99), InputError, "not an ordinary dense tensor"),
    ("layout", WEIGHTS, setting(*META, "layout", value=1), InputError, "not an ordinary dense tensor"),
    ("another type", WEIGHTS, setting(*META, "dtype", value=4), DamagedFileError, "another shape or type"),
    ("elsewhere", WEIGHTS, setting(*W, "path_name", value="../constants/tensor_0"), UnsafeFileError, "outside of"),
    ("no member", WEIGHTS, setting(*W, "path_name", value="weight_99"), DamagedFileError, "no member"),
    ("missing", WEIGHTS, lambda c: c["config"].pop("conv.weight"), DamagedFileError, "conv.weight is not in the file"),
    ("outputs", MODEL, lambda c: c["graph_module"]["graph"]["outputs"].pop(), DamagedFileError, "different outputs"),
    ("inputs", MODEL, lambda c: c["graph_module"]["graph"]["inputs"].pop(), DamagedFileError, "inputs and its"),
    ("nesting", MODEL, setting("graph_module", "module_call_graph", 0, "signature", "out_spec", value="[" * 9999),
     DamagedFileError, "nested inputs and outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("member", "edit", "kind", "reason"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_a_hostile_or_damaged_program_is_refused(  # type: ignore[no-untyped-def]
    exported: Path, tmp_path: Path, monkeypatch, refused, member: str, edit: Edit, kind, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(edited(exported, tmp_path / "m.pt2", member, edit), kind, reason)
    assert not Path("marker").exists()


def test_pickled_sample_inputs_and_guards_stay_unread(exported: Path, tmp_path: Path, program: ProgramFile) -> None:
    evil = pickle.dumps(Calls(os.mkdir, str(tmp_path / "marker")), 2)
    guards = setting("guards_code", value=[f"__import__('os').mkdir({str(tmp_path / 'marker')!r})"])
    with zipfile.ZipFile(exported) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (sample,) = [name for name in members if "sample_inputs" in name]
    again = zip_file(tmp_path / "a.pt2", members | {sample: evil})
    found = read(edited(again, tmp_path / "b.pt2", MODEL, guards)).program
    assert found is not None
    assert found.nodes == program.nodes
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("member", ["data/weights/model.pt", "data/constants/model.pt", "data/aotinductor/model/a.so"])
def test_pickled_weights_and_compiled_code_are_refused(exported: Path, tmp_path: Path, refused, member: str) -> None:  # type: ignore[no-untyped-def]
    path = edited(exported, tmp_path / "m.pt2", MODEL, copy.copy, {member: b"x"})
    refused(path, UnsafeFileError, "pickled weights|compiled code")


def test_a_flipped_bit_in_a_weight_is_found(exported: Path, tmp_path: Path, refused, program: ProgramFile) -> None:  # type: ignore[no-untyped-def]
    damaged = bytearray(exported.read_bytes())
    damaged[damaged.index(program.tensors["conv.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "m.pt2").write_bytes(damaged)
    refused(tmp_path / "m.pt2", DamagedFileError, "fails its checksum")
