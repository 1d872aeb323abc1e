"""Exported programs whose graph lies: sizes that are code, unknown tensors, operators and arguments, broken nesting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Case
from tests.hostile.containers import MODEL, WEIGHTS, Edit, exported, program

Json = dict[str, Any]
_PAYLOAD = "__import__('os').mkdir('marker')"


def _edited(edit: Edit, member: str = MODEL) -> Callable[[Path], object]:
    return lambda path: program(path, {member: edit})


def _graph(content: Json) -> Json:
    found: Json = content["graph_module"]["graph"]
    return found


def _size(text: str) -> Callable[[Path], object]:
    def edit(content: Json) -> None:
        for meta in _graph(content)["tensor_values"].values():
            for size in meta["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text

    return _edited(edit)


def _node(index: int, **fields: Any) -> Callable[[Path], object]:
    return _edited(lambda content: _graph(content)["nodes"][index].update(fields))


def _argument(index: int, position: int, value: Json) -> Callable[[Path], object]:
    return _edited(lambda content: _graph(content)["nodes"][index]["inputs"][position].update(arg=value))


def _spec(name: str, text: str) -> Callable[[Path], object]:
    def edit(content: Json) -> None:
        content["graph_module"]["module_call_graph"][0]["signature"][name] = text

    return _edited(edit)


def _nest(kind: str | None) -> str:
    return json.dumps([1, {"type": kind, "context": "null", "children_spec": []}])


def _weight(**fields: Any) -> Callable[[Path], object]:
    return _edited(lambda content: content["config"]["0.weight"].update(fields), WEIGHTS)


def _geometry(**fields: Any) -> Callable[[Path], object]:
    return _edited(lambda content: content["config"]["0.weight"]["tensor_meta"].update(fields), WEIGHTS)


def _opaque(content: Json) -> None:
    content["config"]["evil"] = {
        "path_name": "opaque_obj_0",
        "is_param": False,
        "use_pickle": True,
        "tensor_meta": None,
    }


def _all_alike(content: Json) -> None:
    # Every weight reads the bytes of the first.
    first = content["config"]["0.weight"]["path_name"]
    for payload in content["config"].values():
        payload["path_name"] = first


def _cycle(content: Json) -> None:
    nodes = _graph(content)["nodes"]
    nodes[0]["inputs"][0]["arg"] = nodes[-1]["outputs"][0]


def _squares(content: Json) -> None:
    """Put calls before the others that square a number forty times."""

    def call(index: int) -> Json:
        operand = {"as_sym_int": {"as_name": f"n{index - 1}"} if index else {"as_int": 3}}
        inputs = [{"name": name, "arg": operand, "kind": 1} for name in "ab"]
        outputs = [{"as_sym_int": {"as_name": f"n{index}"}}]
        return {"target": "_operator.mul", "inputs": inputs, "outputs": outputs, "metadata": {}, "name": f"n{index}"}

    graph = _graph(content)
    graph["sym_int_values"].update({f"n{index}": {"as_int": 9} for index in range(41)})
    graph["nodes"][:0] = [call(index) for index in range(41)]


def _text_times_a_number(content: Json) -> None:
    inputs = [{"name": "a", "arg": {"as_string": "a"}, "kind": 1}, {"name": "b", "arg": {"as_int": 1 << 32}, "kind": 1}]
    outputs = [{"as_sym_int": {"as_name": "n"}}]
    call = {"target": "_operator.mul", "inputs": inputs, "outputs": outputs, "metadata": {}, "name": "n"}
    graph = _graph(content)
    graph["sym_int_values"]["n"] = {"as_int": 9}
    graph["nodes"].insert(0, call)


def _replaced(member: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: program(path, more={member: content})


def _without(member: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        from tests.checkpoint.hostile_files import zip_file

        zip_file(path, {f"net/{name}": data for name, data in exported().items() if name != member})

    return write


_INTS = [{"as_int": 1 << 20}]
_NO_SIZE = "not a plain expression"
_NO_TENSOR = "not in the file|before it is known|at its place|has no shape|signature"
TABLE = [
    ("untouched", lambda path: program(path), None),
    ("size that is code", _size(_PAYLOAD), _NO_SIZE),
    ("size that sympy would run", _size("Symbol('x').__class__.__mro__"), _NO_SIZE),
    ("size with a lambda", _size("(lambda: 1)()"), _NO_SIZE),
    ("size that is a tower of powers", _size("9**9**9**9"), _NO_SIZE),
    ("size of 10,000 brackets", _size("(" * 10_000 + "1" + ")" * 10_000), _NO_SIZE),
    ("size of 400 minus signs", _size("-" * 400 + "1"), None),
    ("size of a number with 900 digits", _size("9" * 900), _NO_SIZE),
    ("size with an escape", _size("s0\x1b[31m"), _NO_SIZE),
    ("size divided by zero", _size("s77//0"), None),
    ("range that is code", _edited(lambda c: c["range_constraints"].update({_PAYLOAD: {"min_val": 0, "max_val": 1}})),
     _NO_SIZE),
    ("range backwards", _edited(lambda c: [r.update(min_val=9, max_val=1) for r in c["range_constraints"].values()]),
     None),
    ("guards that are code", _edited(lambda c: c.update(guards_code=[_PAYLOAD])), None),
    ("module stack that is code", _node(0, metadata={"nn_module_stack": f"L['x'],{_PAYLOAD},\x1b[31m"}), None),
    ("version of torch with an escape", _edited(lambda c: c.update(torch_version="\x1b[31m" + "9" * 9999)), None),
    ("opaque constant", _edited(_opaque, "data/constants/model_constants_config.json"), "opaque objects: evil"),
    ("opaque value", _edited(lambda c: _graph(c).update(custom_obj_values={"o\x1b": {}})), "uses opaque objects"),
    ("sub-graph", _argument(0, 0, {"as_graph": {"name": "x", "graph": {}}}), "does not follow"),
    ("custom object", _argument(0, 0, {"as_custom_obj": {"name": "x", "class_fqn": "os.mkdir"}}), "does not follow"),
    ("operator", _argument(0, 0, {"as_operator": "torch.ops.aten.add"}), "does not follow"),
    ("unknown field with an escape", _edited(lambda c: c.update({"\x1b[31mred": 1})), "does not follow"),
    ("another schema", _edited(lambda c: c["schema_version"].update(major=1 << 40)), "schema version"),
    ("target that is code", _node(0, target=_PAYLOAD), "not among the operators"),
    ("target of another library", _node(0, target="torch.ops.quantized.conv2d.default"), "not among the operators"),
    ("target that reads a file", _node(0, target="torch.ops.aten.from_file.default"), "not among the operators"),
    ("target of Python", _node(0, target="builtins.exec"), "not among the operators"),
    ("target of torch", _node(0, target="torch.load"), "not among the operators"),
    ("target by attributes", _node(0, target="torch.ops.aten.add.__class__"), "not among the operators|unknown"),
    ("target that is not in torch", _node(0, target="torch.ops.aten.conv2d.nothing"), "unknown to torch"),
    ("target with an escape", _node(0, target="torch.ops.aten.\x1b[31m.default"), "not among the operators"),
    ("another operator", _node(0, target="torch.ops.aten.embedding.default"), "cannot|does not take"),
    ("unknown tensor in a call", _argument(0, 1, {"as_tensor": {"name": "p_evil"}}), _NO_TENSOR),
    ("tensor of a later call", _edited(_cycle), _NO_TENSOR),
    ("number for a weight", _argument(0, 1, {"as_int": 3}), "cannot"),
    ("text for a weight", _argument(0, 1, {"as_string": "\x1b[31mred"}), "cannot"),
    ("none for a weight", _argument(0, 1, {"as_none": True}), "cannot"),
    ("list for a weight", _argument(0, 1, {"as_ints": [1, 2]}), "cannot"),
    ("number of 2**100", _argument(0, 1, {"as_int": 1 << 100}), "does not follow|cannot"),
    ("infinite number", _argument(0, 1, {"as_float": "Infinity"}), "cannot"),
    ("power of powers", _edited(_squares), "size of up to"),
    ("text of 4 GB", _edited(_text_times_a_number), "other arguments than two"),
    ("call without outputs", _node(0, outputs=[]), "no name of its own|before it is known"),
    ("output with an unusable name", _node(0, outputs=[{"as_tensor": {"name": "a b\x1b"}}]), "unusable name"),
    ("call twice", _edited(lambda c: _graph(c)["nodes"].append(_graph(c)["nodes"][0])), "twice|no name of its own"),
    ("no calls", _edited(lambda c: _graph(c).update(nodes=[])), "before it is known"),
    ("no outputs", _edited(lambda c: _graph(c).update(outputs=[])), "different outputs"),
    ("inputs in another order", _edited(lambda c: _graph(c)["inputs"].reverse()), _NO_TENSOR),
    ("weight without a shape", _edited(lambda c: _graph(c)["tensor_values"].clear()), _NO_TENSOR),
    ("nesting of 10,000", _spec("in_spec", "[" * 10_000), "nested inputs and outputs"),
    ("nesting of a million digits", _spec("in_spec", "[1, " + "9" * 1_000_000 + "]"), "nested inputs and outputs"),
    ("nesting with a class", _spec("out_spec", _nest("os.mkdir")), "os.mkdir"),
    ("nesting of nothing", _spec("in_spec", _nest("builtins.tuple")), "nest in an unknown way"),
    ("nesting of a leaf", _spec("in_spec", _nest(None)), "nest in an unknown way"),
    ("weight outside of its folder", _weight(path_name="../../../../etc/passwd"), "kept outside"),
    ("weight that is not there", _weight(path_name="weight_99"), "no member"),
    ("weight that is a pickle", _weight(use_pickle=True), "pickled or opaque"),
    ("weight that is not described", _edited(lambda c: c["config"].pop("0.weight"), WEIGHTS), "not in the file"),
    ("weights of the same bytes", _edited(_all_alike, WEIGHTS), ""),
    ("weight of a trillion elements", _geometry(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]), "claims"),
    ("weight with another shape", _geometry(sizes=[{"as_int": 36}], strides=[{"as_int": 1}]), "another shape"),
    ("weight with more sizes than strides", _geometry(strides=_INTS), "sizes and 1 strides"),
    ("weight with a free size", _geometry(sizes=[{"as_expr": {"expr_str": "s0"}}] * 4), "free or negative"),
    ("weight with a giant offset", _geometry(storage_offset={"as_int": 1 << 61}), "claims"),
    ("weight of an unknown type", _geometry(dtype=99), "not an ordinary dense tensor"),
    ("weight of whole numbers", _geometry(dtype=4), "another shape or type"),
    ("weight of another layout", _geometry(layout=1), "not an ordinary dense tensor"),
    ("big-endian", _replaced("byteorder", b"big"), "big-endian"),
    ("another kind of archive", _replaced("archive_format", b"evil\x1b"), "pt2 archive"),
    ("graph that is not JSON", _replaced(MODEL, b"{" * 100_000), "does not follow"),
    ("graph that is not UTF-8", _replaced(MODEL, b'{"\xff":1}'), "does not follow"),
    ("graph of nothing", _replaced(MODEL, b"{}"), "does not follow"),
    ("two models", _replaced("models/other.json", b"{}"), "needed: one, called model"),
    ("no graph", _without(MODEL), "no model|models none"),
    ("no table of weights", _without(WEIGHTS), "no member"),
    ("no weights", _without("data/weights/weight_0"), "no member"),
]  # fmt: skip

CASES = tuple(Case(f"pt2: {name}", write, reason) for name, write, reason in TABLE)
