"""A graph as JSON gives the same outputs again; a tampered one is refused before anything in it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter

import repconv_cli
from repconv_cli.errors import InputError
from repconv_cli.graph import schema, serial
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.trace import trace
from tests.graph.models import DiverseBranch, Formula, RepVGG, TwoInputs, conv, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 7, 7)
ONLY_THE_BATCH_IS_FREE = ((True, False, False, False),)


def nested_outputs(part: Any, x: Tensor) -> dict[str, Any]:
    return {"a": part.a(x).max(), "b": [x, (x.clamp(max=float("inf")), 3)]}


@pytest.fixture(scope="module")
def program() -> Program:
    module = nn.Sequential(RepVGG(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return trace(randomised(module), noise(SHAPE))


@pytest.fixture
def document(program: Program) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(program))
    return found


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(RepVGG(), nn.GELU(), nn.Flatten(), nn.Linear(196, 3)), SHAPE),
        (DiverseBranch, SHAPE),
        (
            lambda: Formula(lambda p, x: {"a": p.a(x).max(), "b": [x, (x.clamp(max=float("inf")), 3)]}, a=conv(4, 4)),
            SHAPE,
        ),
        (lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(4, 2), nn.PixelShuffle(1), nn.Softmax(1)), SHAPE),
    ],
)
def test_round_trip_gives_equal_outputs_to_the_bit(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    program = trace(randomised(make()), noise(shape), may_vary=ONLY_THE_BATCH_IS_FREE)
    again = from_json(to_json(program), program.tensors)
    x = noise((3, *shape[1:]), seed=1)
    before, after = ProgramModule(program)(*x), ProgramModule(again)(*x)
    assert torch.utils._pytree.tree_structure(before) == torch.utils._pytree.tree_structure(after)
    flat = zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in flat)
    assert to_json(again) == to_json(program)


def test_keyword_inputs_and_dict_outputs_survive_the_round_trip() -> None:
    x, other = noise(SHAPE, (2, 4, 9, 9))
    program = trace(randomised(TwoInputs()), (x,), {"other": other})
    again = from_json(to_json(program), program.tensors)
    found = ProgramModule(again)(x, other=other)
    expected = ProgramModule(program)(x, other=other)
    assert found.keys() == {"left", "pair"}
    assert torch.equal(found["pair"][0], expected["pair"][0])


class Conditioned(nn.Module):
    """A map and a step that it is at, with something to add that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(4, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, step: Tensor, *, more: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x) + self.b(step)[..., None, None]
        return y if more is None else y + more


def test_inputs_by_place_may_be_given_by_their_names(tmp_path: Path) -> None:
    module, (x, step) = randomised(Conditioned()), noise(SHAPE, (2, 3))
    np.savez(tmp_path / "given.npz", step=step.numpy(), more=x.numpy(), x=x.numpy())
    repconv_cli.fuse(module, tmp_path / "out", inputs=tmp_path / "given.npz")
    model, expected = repconv_cli.load(tmp_path / "out"), module(x, step, more=x)
    for args, kwargs in (
        ((x, step), {"more": x}),
        ((x,), {"more": x, "step": step}),
        ((), {"step": step, "x": x, "more": x}),
    ):
        torch.testing.assert_close(model(*args, **kwargs), expected, rtol=1e-4, atol=1e-4)
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        ((x, step, x), {}),
        ((x, step), {}),
        ((x,), {"more": x}),
        ((x, step), {"x": x, "more": x}),
        ((), {}),
    ]
    for args, kwargs in wrong:
        with pytest.raises(InputError, match=re.escape("(x, step, more=)")):
            model(*args, **kwargs)


def test_a_single_input_by_name_may_be_given_by_its_place(tmp_path: Path) -> None:
    module, (x,) = randomised(nn.Sequential(conv(4, 4))), noise(SHAPE)
    repconv_cli.fuse(module, tmp_path / "out", kwargs={"input": x})
    model = repconv_cli.load(tmp_path / "out")
    assert torch.equal(model(x), model(input=x))


def test_dicts_keep_the_kind_of_their_keys(tmp_path: Path) -> None:
    def forward(part: Any, levels: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return {key: part.a(levels[key]).relu() for key in (8, 0.5, True, "8")}

    module, (x,) = randomised(Formula(forward, a=conv(4, 4))), noise(SHAPE)
    levels = {key: x * place for place, key in enumerate((8, 0.5, True, "8"))}
    repconv_cli.fuse(module, tmp_path / "out", args=(levels,))
    with torch.no_grad():
        found, expected = repconv_cli.load(tmp_path / "out")(levels), module(levels)
    assert list(map(repr, found)) == list(map(repr, expected))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


@pytest.mark.parametrize("name", ["program", "forward_", "0", "torch", "self", "größe", "class", "lambda", "in"])
def test_module_names_that_are_names_of_the_module_class_work(name: str) -> None:
    module = randomised(Formula(lambda p, x: p.parts[name](x).relu(), parts=nn.ModuleDict({name: conv(4, 4)})))
    program = trace(module, noise(SHAPE), may_vary=ONLY_THE_BATCH_IS_FREE)
    x = noise(SHAPE, seed=1)[0]
    assert torch.equal(ProgramModule(program)(x), module(x))
    assert set(ProgramModule(program).state_dict()) == set(module.state_dict())
    again = from_json(to_json(program), program.tensors)
    assert torch.equal(ProgramModule(again)(x), module(x))


def test_a_key_that_holds_a_keyword_works(program: Program, document: dict[str, Any]) -> None:
    old = "4.weight"
    _first({"nodes": [n for n in document["nodes"] if n.get("key") == old]}, "tensor")["key"] = "class.lambda"
    document["parameters"] = ["class.lambda" if name == old else name for name in document["parameters"]]
    tensors = {"class.lambda" if name == old else name: value for name, value in program.tensors.items()}
    again = ProgramModule(from_json(json.dumps(document), tensors))
    x = noise(SHAPE, seed=1)[0]
    assert torch.equal(again(x), ProgramModule(program)(x))
    assert "class.lambda" in again.state_dict()


@pytest.mark.parametrize("name", ["program", "torch"])
def test_top_level_module_names_work(name: str) -> None:
    module = randomised(Formula(lambda p, x: getattr(p, name)(x).relu(), **{name: conv(4, 4)}))
    program = trace(module, noise(SHAPE), may_vary=ONLY_THE_BATCH_IS_FREE)
    x = noise(SHAPE, seed=1)[0]
    assert torch.equal(ProgramModule(program)(x), module(x))


def test_inputs_named_like_modules_of_torch_work() -> None:
    class Named(nn.Module):
        def forward(self, torch: Tensor, device: Tensor) -> Tensor:
            return torch.relu() + device

    x, y = noise(SHAPE, SHAPE)
    program = trace(Named(), (x, y))
    assert torch.equal(ProgramModule(program)(x, y), x.relu() + y)


def _first(document: dict[str, Any], op: str) -> dict[str, Any]:
    node: dict[str, Any] = next(node for node in document["nodes"] if node["op"] == op)
    return node


def _operator(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: _first(document, "aten.relu.default").update(op=name)


def _argument(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: _first(document, "aten.relu.default").update(args=[value])


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _own_index(document: dict[str, Any]) -> None:
    node = _first(document, "aten.relu.default")
    node["args"] = [{"node": document["nodes"].index(node)}]


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown operator": (_operator("aten.frobnicate.default"), r"'aten.frobnicate.default' is not among"),
    "reads a file": (_operator("aten.from_file.default"), r"'aten.from_file.default' is not among"),
    "in place": (_operator("aten.relu_.default"), r"'aten.relu_.default' is not among"),
    "out variant": (_operator("aten.add.out"), r"'aten.add.out' is not among"),
    "another namespace": (_operator("prims.add.default"), r"'prims.add.default' is not among"),
    "attribute of the packet": (_operator("aten.relu.__class__"), r"'aten.relu.__class__' is unknown"),
    "overload that there is not": (_operator("aten.relu.nothing"), r"'aten.relu.nothing' is unknown"),
    "python code": (_operator("__import__('os').system('true')"), r"is not among the operators"),
    "builtin": (_operator("builtins.eval"), r"is not among the operators"),
    "uninitialised memory": (_operator("aten.empty.memory_format"), r"is not among the operators"),
    "unknown tensor": (
        lambda d: _first(d, "tensor").update(key="no.such.weight"),
        r"reads the tensor 'no.such.weight', which the file does not hold",
    ),
    "forward reference": (_argument({"node": 10_000}), r"refers to node 10000, which does not come before"),
    "reference to itself": (_own_index, r"which does not come before"),
    "negative reference": (_argument({"node": -1}), r"refers to node -1, which does not come before"),
    "reference that is a boolean": (_argument({"node": True}), r"refers to node True"),
    "reference that is text": (_argument({"node": "0"}), r"refers to node 0"),
    "argument of unknown kind": (_argument({"code": "1+1"}), r"argument .* of unknown form"),
    "argument of two kinds": (_argument({"node": 0, "float": "nan"}), r"argument .* of unknown form"),
    "unknown dtype": (_argument({"dtype": "object"}), r"argument .* of unknown form"),
    "unknown device": (_argument({"device": "meta"}), r"argument .* of unknown form"),
    "too deep for us": (_argument(_nested(100)), r"nests arguments too deeply"),
    "bad version": (lambda d: d.update(version=2), r"its graph has version 2; needed: version 1"),
    "version that is text": (lambda d: d.update(version="1"), r"its graph is not valid"),
    "extra field": (lambda d: d.update(code="import os"), r"its graph is not valid: .*unknown field `code`"),
    "extra field of a node": (
        lambda d: d["nodes"][0].update(target="os.system"),
        r"its graph is not valid: .*unknown field `target`",
    ),
    "missing field": (lambda d: d.pop("results"), r"its graph is not valid: .*missing required field `results`"),
    "nodes that are no list": (lambda d: d.update(nodes={}), r"its graph is not valid"),
    "wrong argument name": (
        lambda d: _first(d, "aten.relu.default").update(kwargs={"out": 1}),
        r"aten.relu.default with arguments that it does not take",
    ),
    "too many arguments": (
        lambda d: _first(d, "aten.relu.default").update(args=[{"node": 0}, 1, 2]),
        r"aten.relu.default with arguments that it does not take",
    ),
    "an input too many": (lambda d: d["nodes"].append({"op": "input"}), r"input"),
    "an input that no node takes": (lambda d: d["inputs"].append(dict(d["inputs"][0])), r"input"),
    "input of unknown dtype": (lambda d: d["inputs"][0].update(dtype="object"), r"no usable shape and dtype"),
    "input of two lengths": (lambda d: d["inputs"][0].update(shape=[1]), r"no usable shape and dtype"),
    "result that there is not": (lambda d: d.update(results=[{"node": 9999}]), r"refers to node 9999"),
    "more results than it nests": (lambda d: d["results"].append(d["results"][0]), r"do not match how it says"),
    "unknown nesting": (lambda d: d["outputs"].update(kind="os.system"), r"nests inputs or outputs in an unknown way"),
    "dict without keys": (
        lambda d: d.update(outputs={"kind": "dict", "children": [{"kind": "leaf"}]}),
        r"nests inputs or outputs in an unknown way",
    ),
    "arguments that are a leaf": (lambda d: d.update(arguments={"kind": "leaf"}), r"arguments are no tuple and dict"),
    "unknown parameter": (lambda d: d["parameters"].append("nothing"), r"parameters that the file does not hold"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_graph_is_refused(
    program: Program, document: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interpreter, "run", lambda *_: pytest.fail("the graph was run"))
    monkeypatch.setattr(torch.fx.GraphModule, "__init__", lambda *_, **__: pytest.fail("code was generated"))
    change, reason = TAMPERED[name]
    change(document)
    with pytest.raises(InputError, match=reason):
        from_json(json.dumps(document), program.tensors)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"version": 1}', "[" * 100_000, '{"a":' * 50_000])
def test_text_that_is_no_graph_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="its graph is not valid"):
        from_json(text, {})


def test_arguments_nested_beyond_the_parser_are_refused(program: Program, document: dict[str, Any]) -> None:
    _first(document, "aten.relu.default")["args"] = ["DEEP"]
    text = json.dumps(document).replace('"DEEP"', "[" * 50_000 + "]" * 50_000)
    with pytest.raises(InputError, match="its graph is not valid"):
        from_json(text, program.tensors)


def test_structure_nested_beyond_the_limit_is_refused(program: Program, document: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"kind": "leaf"}
    for _ in range(70):
        nested = {"kind": "tuple", "children": [nested]}
    document["outputs"] = nested
    with pytest.raises(InputError, match="nests inputs or outputs in an unknown way"):
        from_json(json.dumps(document), program.tensors)


def test_too_many_nodes_are_refused(
    program: Program, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "MAX_NODES", 5)
    with pytest.raises(InputError, match=r"its graph has \d+ nodes; needed: at most 5"):
        from_json(json.dumps(document), program.tensors)


@pytest.mark.parametrize(
    "key",
    [
        'a"); __import__("os").system("true"); ("',
        "a'b.weight",
        "a\\b.weight",
        "a\nimport os.weight",
        "a..weight",
        "",
        "__class__.weight",
        "forward.weight",
        "training",
    ],
)
def test_key_that_cannot_be_a_module_path_is_refused(program: Program, document: dict[str, Any], key: str) -> None:
    node = _first(document, "tensor")
    old, node["key"] = node["key"], key
    document["parameters"] = [key if name == old else name for name in document["parameters"]]
    tensors = {key if name == old else name: value for name, value in program.tensors.items()}
    with pytest.raises(InputError, match=r"cannot be a module path|collides with another name"):
        ProgramModule(from_json(json.dumps(document), tensors))


def test_two_keys_of_which_one_is_a_module_of_the_other_are_refused() -> None:
    tensors = {"a": torch.ones(1), "a.weight": torch.ones(1)}
    nodes = [{"op": "tensor", "key": key} for key in tensors]
    document = {
        "version": 1,
        "inputs": [],
        "arguments": {"kind": "tuple"},
        "keywords": {"kind": "dict"},
        "outputs": {"kind": "tuple", "children": [{"kind": "leaf"}] * 2},
        "parameters": [],
        "nodes": nodes,
        "results": [{"node": 0}, {"node": 1}],
    }
    with pytest.raises(InputError, match="collides with another name"):
        ProgramModule(from_json(json.dumps(document), tensors))


@pytest.mark.parametrize("name", ["x): import os\ndef f(", "self", "torch", "class", "x", ""])
def test_an_input_name_never_becomes_code(program: Program, document: dict[str, Any], name: str) -> None:
    """The name in the file is a label: whatever it is, the model runs as before, or the file is refused."""
    document["inputs"][0]["name"] = name
    again = from_json(json.dumps(document), program.tensors)
    x = noise(SHAPE, seed=1)[0]
    assert torch.equal(ProgramModule(again)(x), ProgramModule(program)(x))


def test_a_model_with_an_operator_that_files_may_not_hold_is_refused_by_name() -> None:
    program = trace(Formula(lambda _, x: torch.special.bessel_j0(x)), noise(SHAPE))
    with pytest.raises(
        InputError, match=r"the operator aten\.special_bessel_j0\.\w+, which the file format does not hold"
    ):
        to_json(program)


def test_the_published_schema_is_the_one_that_files_are_read_by(program: Program) -> None:
    """``python -m repconv_cli.graph.schema`` writes it anew."""
    assert schema.PUBLISHED.read_text() == schema.graph_schema()
    names = json.loads(schema.graph_schema())["$defs"]["GraphSpec"]["properties"]
    assert set(names) == set(json.loads(to_json(program)))
