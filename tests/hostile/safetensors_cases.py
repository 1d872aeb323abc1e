"""safetensors files whose header lies, or whose content is no net."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from tests.hostile.case import Case, make_state
from tests.hostile.greedy_cases import fused_graph
from tests.hostile.headers import entry, header_file


def _table(tensors: dict[str, Any]) -> Callable[[Path], object]:
    return header_file(tensors, 12)


def _metadata(notes: object) -> Callable[[Path], object]:
    return header_file({"__metadata__": notes, "a": entry(0, 12, 3)}, 12)


def _length(length: int) -> Callable[[Path], object]:
    return header_file({"a": entry(0, 12, 3)}, 12, length)


def _repeated(path: Path) -> None:
    text = b'{"a":' + json.dumps(entry(0, 12, 3)).encode() + b',"a":' + json.dumps(entry(0, 12, 3)).encode() + b"}"
    header_file(text, 12)(path)


_NO_TABLE = "not a table of tensors"
HEADERS = [
    ("length of 2**63", _length(1 << 63), "not known|header claims"),
    ("length of 2**64 - 1", _length((1 << 64) - 1), "not known|header claims"),
    ("length of 100 MB", _length(100_000_000), "header claims 100000000 bytes"),
    ("length of 0", _length(0), "not known"),
    ("length of 1", _length(1), "not known|not a table"),
    ("length too short by one", lambda p: header_file(b'{"a":{}}', 12, 7)(p), _NO_TABLE),
    ("overlapping tensors", _table({"a": entry(0, 8, 2), "b": entry(4, 12, 2)}), "overlaps"),
    ("the same bytes twice", _table({"a": entry(0, 12, 3), "b": entry(0, 12, 3)}), "overlaps"),
    ("hole", _table({"a": entry(0, 4, 1), "b": entry(8, 12, 1)}), "belong to no tensor"),
    ("bytes left over", _table({"a": entry(0, 4, 1)}), "take 4 bytes and the file has 12"),
    ("bytes that are not there", _table({"a": entry(0, 400, 100)}), "take 400 bytes"),
    ("offsets backwards", _table({"a": entry(12, 0, 3)}), "has -12 bytes"),
    ("negative offsets", _table({"a": entry(-12, 0, 3)}), "overlaps|not a table"),
    ("shape that overflows", _table({"a": entry(0, 12, 1 << 32, 1 << 32, 3)}), "has 12 bytes"),
    ("shape of a trillion", _table({"a": entry(0, 0, 0, 1 << 62), "b": entry(0, 12, 3)}), "needed: the architecture"),
    ("negative shape", _table({"a": entry(0, 12, -3)}), "no possible shape"),
    ("shape of floats", _table({"a": {**entry(0, 12), "shape": [3.0]}}), _NO_TABLE),
    ("shape of numbers with 400 digits", _table({"a": entry(0, 12, 10**400)}), f"has 12 bytes|{_NO_TABLE}"),
    ("30 axes", _table({"a": entry(0, 4, *[1] * 30), "b": entry(4, 12, 2)}), "no possible shape"),
    ("unknown type", _table({"a": entry(0, 12, 3, dtype="F4\x1b[31m")}), r"type F4\\x1b"),
    ("unknown field", _table({"a": {**entry(0, 12, 3), "code": "x"}}), _NO_TABLE),
    ("three offsets", _table({"a": {**entry(0, 12, 3), "data_offsets": [0, 4, 12]}}), _NO_TABLE),
    ("name twice", _repeated, _NO_TABLE),
    ("list for a table", lambda p: header_file(b"[1,2,3]    ", 12)(p), "not known|not a table"),
    ("nested 200,000 deep", lambda p: header_file(b'{"a":' * 200_000, 12)(p), _NO_TABLE),
    ("number of a million digits", lambda p: header_file(b'{"a":' + b"9" * 1_000_000 + b"}", 12)(p), _NO_TABLE),
    ("not UTF-8", lambda p: header_file(b'{"\xff\xfe":1}', 12)(p), _NO_TABLE),
    ("lone surrogate", lambda p: header_file(
        b'{"\\ud800":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}', 12)(p), "needed: the architecture"),
    ("tensor called __metadata__", _metadata(entry(0, 12, 3)), _NO_TABLE),
    ("metadata that is no text", _metadata({"a": 1}), _NO_TABLE),
    ("metadata that is a list", _metadata(["a"]), _NO_TABLE),
    ("no tensors", lambda p: header_file({}, 0)(p), "holds no tensors|not known"),
    ("metadata alone", lambda p: header_file({"__metadata__": {"a": "b"}}, 0)(p), "holds no tensors"),
]  # fmt: skip


def _graph(text: str, version: str = "1") -> Callable[[Path], object]:
    return _metadata({"repconv.format": version, "repconv.graph": text})


def _evil(op: str, *args: Any, **kwargs: Any) -> Callable[[Path], object]:
    return fused_graph({"op": op, "args": list(args), "kwargs": kwargs})


_INPUT, _WEIGHT = {"node": 0}, {"node": 1}
# A number that is squared forty times.
_SQUARES = ({"op": "size.mul", "args": [3, 3]}, *({"op": "size.mul", "args": [{"node": n}] * 2} for n in range(2, 42)))
FUSED = [
    ("graph that is not JSON", _graph("{"), "graph is not valid"),
    ("graph with an escape in a field", _graph('{"\x1b[31mred": 1}'), "graph is not valid"),
    ("graph with a field of 60,000 characters", _graph('{"' + "n" * 60_000 + '": 1}'), "graph is not valid"),
    ("graph nested deeply", _graph('{"a":' * 100_000), "graph is not valid"),
    ("graph of another version", _graph("{}", "2\x1b[31m"), "format version"),
    ("operator with code", _evil("__import__('os').mkdir"), "not among the operators"),
    ("operator by a dotted path", _evil("aten.add.__class__"), "not among the operators|unknown to torch"),
    ("operator of another library", _evil("prims.add.default", _INPUT), "not among the operators"),
    ("operator that writes a file", _evil("aten.from_file.default", "/tmp/x"), "not among the operators"),
    ("operator that writes to its input", _evil("aten.copy_.default", _INPUT, _INPUT), "not among the operators"),
    ("memory that nobody filled", _evil("aten.empty.memory_format", [4]), "not among the operators"),
    ("operator with an escape", _evil("aten.\x1b[31mred.default", _INPUT), "not among the operators"),
    ("operator that is not in torch", _evil("aten.add.Nothing", _INPUT), "unknown to torch"),
    ("reference to itself", _evil("aten.relu.default", {"node": 2}), "does not come before"),
    ("reference backwards", _evil("aten.relu.default", {"node": -1}), "does not come before"),
    ("reference of another type", _evil("aten.relu.default", {"node": "x\x1b"}), "does not come before"),
    ("too few arguments", _evil("aten.conv2d.default", _INPUT), "does not fit together"),
    ("too many arguments", _evil("aten.relu.default", *[_INPUT] * 9), "does not take"),
    ("unknown keyword", _evil("aten.relu.default", _INPUT, evil=1), "does not take"),
    ("text for a tensor", _evil("aten.relu.default", "x"), "does not fit together"),
    ("number for a tensor", _evil("aten.relu.default", 1), "does not fit together"),
    ("dtype for a tensor", _evil("aten.relu.default", {"dtype": "float32"}), "does not fit together"),
    ("graph without tensors", _evil("aten.linear.default", _INPUT, {"node": 0}), "no tensors to write"),
    ("shapes that do not fit in a product", _evil("aten.mm.default", _INPUT, _INPUT), "does not fit together"),
    ("division of sizes by zero", _evil("size.floordiv", 1, 0), "does not fit together"),
    ("text of 4 GB", _evil("size.mul", "a", 1 << 32), "values or numbers"),
    ("list of 4 billion", _evil("size.mul", [0], 1 << 32), "values or numbers"),
    ("power of powers", fused_graph(*_SQUARES), "size of up to 2048 bits"),
    ("a size to the power of a billion", _evil("size.pow", 3, 1 << 30), "raises a size"),
    ("a size to the power of no number", _evil("size.pow", 3, {"float": "nan"}), "raises a size"),
    ("nothing to a negative power", _evil("size.pow", 0, -1), "does not fit together"),
    ("a size to no power", _evil("size.pow", 3), "raises a size"),
    ("item of a tensor", _evil("getitem", _INPUT, 99), "does not fit together"),
    ("attribute for an item", _evil("getitem", _INPUT, "__class__"), "values or numbers"),
    ("constant of the wrong type", _evil("aten.add.Tensor", _INPUT, {"device": "cuda"}), "does not fit together"),
    ("device that is not there",
     _evil("aten._to_copy.default", _INPUT, device={"device": "cuda"}), "no tensors to write"),
    ("einsum of nothing", _evil("aten.einsum.default", "\x1b[31mab,", [_INPUT]), "does not fit together"),
]  # fmt: skip


def _fused_of_nothing(path: Path) -> None:
    save_file(make_state(), path, {"repconv.graph": "{}", "repconv.format": "1"})


def _cut(path: Path) -> None:
    path.write_bytes(save(make_state())[:-1])


def _flipped_name(path: Path) -> None:
    path.write_bytes(save(make_state()).replace(b"0.weight", b"0.weigh\x01"))


def _extra(path: Path) -> None:
    save_file({**make_state(), "__proto__": torch.ones(1)}, path)


WEIGHTS = [
    ("whole", lambda path: save_file(make_state(), path), None),
    ("cut by one byte", _cut, "take .* bytes and the file has"),
    ("control character in a name", _flipped_name, _NO_TABLE),
    ("an extra tensor", _extra, "1 unexpected"),
    ("fused graph that is empty", _fused_of_nothing, None),
]

CASES = (
    *(Case(f"safetensors: {name}", write, reason) for name, write, reason in (*HEADERS, *FUSED)),
    *(Case(f"safetensors weights: {name}", write, reason, True) for name, write, reason in WEIGHTS),
)
