"""Small files that ask for much memory, much time, or many objects."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoint.hostile_files import Calls, Stored, checkpoint, pickled, tensor_claim, zip_file
from tests.hostile import containers
from tests.hostile.case import Case, make_net
from tests.hostile.headers import header_file

_HUGE = 1 << 30
_FLOATS = {"0": struct.pack("<4f", 1, 2, 3, 4)}
_UNADMITTED = "asks for what is not plain weights"


def _data(data_pkl: bytes) -> Callable[[Path], object]:
    return lambda path: checkpoint(path, data_pkl, _FLOATS)


def _value(value: object) -> Callable[[Path], object]:
    return lambda path: checkpoint(path, pickled(value), _FLOATS)


def _net(*layers: nn.Module, **changed: Any) -> Callable[[Path], object]:
    """Return a writer of a module; ``changed`` are attributes of its first layer."""

    def write(path: Path) -> None:
        layers[0].__dict__.update(changed)
        torch.save(nn.Sequential(*layers).eval(), path)

    return write


def _lstm(path: Path) -> None:
    # An old LSTM rebuilds its table of weights at load, as many rows as it says that it has layers.
    lstm = nn.LSTM(2, 2)
    lstm.__dict__.update(num_layers=_HUGE, _all_weights=[[torch.ones(1)]])
    torch.save(nn.Sequential(lstm), path)


def _wide_program(path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        sizes = content["graph_module"]["graph"]["tensor_values"]["input"]["sizes"]
        sizes[2] = sizes[3] = {"as_int": 1 << 16}

    containers.program(path, {containers.MODEL: edit})


def _hint_program(path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]["hint"] = {"as_int": 1 << 40}

    containers.program(path, {containers.MODEL: edit})


def fused_graph(*nodes: dict[str, Any], example: tuple[int, ...] = (2, 4)) -> Callable[[Path], object]:
    """Return a writer of a file as ``fuse`` writes it, whose graph has an input, a tensor and then these nodes."""
    graph = {
        "version": 1,
        "inputs": [{"name": "x", "shape": list(example), "example": list(example), "dtype": "float32"}],
        "arguments": {"kind": "tuple", "children": [{"kind": "leaf"}]},
        "keywords": {"kind": "dict"},
        "outputs": {"kind": "leaf"},
        "parameters": ["w"],
        "nodes": [{"op": "input"}, {"op": "tensor", "key": "w"}, *nodes],
        "results": [{"node": len(nodes) + 1}],
    }
    notes = {"repconv.format": "1", "repconv.graph": json.dumps(graph)}
    table = {"__metadata__": notes, "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    return header_file(table, 16)


def _call(op: str, *args: Any) -> dict[str, Any]:
    return {"op": op, "args": list(args)}


_INPUT, _WEIGHT = {"node": 0}, {"node": 1}

PICKLES = [
    ("memo of 1 GB", _data(b"\x80\x02}r\xff\xff\xff\x3f."), "holds no weights"),
    ("memo of 4 GB in a legacy file",
     lambda path: containers.legacy(path, b"\x80\x02}r\xff\xff\xff\xff."), "no weights"),
    ("lists in lists", _data(b"\x80\x02" + b"]" * 450_000 + b"a" * 449_999 + b"."), "holds a list"),
    ("tuples in tuples", _data(b"\x80\x02)" + b"\x85" * 900_000 + b"."), "holds a tuple"),
    ("each list twice in the next", _data(b"\x80\x02]" + b"2\x86" * 500 + b"."), "nested more than|holds a"),
    ("many steps", _data(b"\x80\x02" + b"N0" * 600_000 + b"}."), "more than 1000000 steps"),
    ("many sets", _data(b"\x80\x04" + b"\x8f" * 950_000 + b"N."), "more than 1000000 steps"),
    ("many memos", _data(b"\x80\x04N" + b"\x94" * 950_000 + b"N."), "not well-formed"),
    ("many names", _data(b"\x80\x02" + b"ctorch\nhalf\n" * 950_000 + b"."), "more than 1000000 steps"),
    ("many lists", _data(b"\x80\x02" + b"]" * 950_000 + b"N."), "not well-formed"),
    ("many dicts", _data(b"\x80\x02" + b"}" * 950_000 + b"N."), "not well-formed"),
    ("many modules", _data(b"\x80\x02ctorch.nn.modules.linear\nLinear\nq\x00" + b"h\x00)\x81" * 300_000 + b"."), "not"),
    ("bytearray(3 GiB)", _value(Calls(bytearray, 3 << 30)), _UNADMITTED),
    ("FloatTensor(n)", _data(b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R."), _UNADMITTED),
    ("torch.empty(n)", _value(Calls(torch.empty, _HUGE)), _UNADMITTED),
    ("nn.Linear(20000, 20000)", _value(Calls(nn.Linear, 20000, 20000)), _UNADMITTED),
    ("text of 4 GB", _data(b"\x80\x02X\xff\xff\xff\xff."), "not well-formed"),
    ("bytes of 2**63", _data(b"\x80\x05\x8e" + struct.pack("<Q", 1 << 63) + b"."), "not well-formed"),
    ("bytearray of 2**62", _data(b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"."), "not well-formed"),
    ("number of 256 MB", _data(b"\x80\x02\x8b\xff\xff\xff\x0f."), "not well-formed"),
    ("number of 60,000 digits", _data(b"I" + b"9" * 60_000 + b"\n."), "not well-formed"),
    ("frame of 2**63", _data(b"\x80\x04\x95" + struct.pack("<Q", 1 << 63) + b"}."), "not well-formed|no weights"),
    ("stride-0 giant", _value({"w": tensor_claim(Stored("0", 4), 0, (10**10,), (0,))}), "claims 10000000000 elements"),
    ("many stride-0 tensors",
     _value({f"w{n}": tensor_claim(Stored("0", 4), 0, (1 << 20,), (0,)) for n in range(64)}),
     "claims 1048576 elements"),
    ("storage of 1 TB", _value({"w": tensor_claim(Stored("0", 1 << 38), 0, (1 << 38,), (1,))}), "at most the file's"),
    ("offset of 2**61", _value({"w": tensor_claim(Stored("0", 4), 1 << 61, (4,), (1,))}), "which holds 4"),
    ("sizes whose product overflows", _value({"w": tensor_claim(Stored("0", 4), 0, (1 << 33,) * 8, (0,) * 8)}),
     "claims"),
]  # fmt: skip

_TOO_LARGE = "elements; needed: at most|makes a tensor of"
GRAPHS = [
    ("LSTM of a billion layers", _lstm, "claims 1073741824 layers"),
    ("conv with a giant padding", _net(nn.Conv2d(1, 1, 3, padding=30_000)), _TOO_LARGE),
    ("giant pad", _net(nn.Conv2d(1, 1, 1), nn.ConstantPad2d(40_000, 0.0)), _TOO_LARGE),
    ("giant upsampling", _net(nn.Conv2d(1, 1, 1), nn.Upsample(scale_factor=1000)), _TOO_LARGE),
    ("norm of a billion channels",
     _net(nn.BatchNorm2d(1, affine=False, track_running_stats=False), num_features=_HUGE), _TOO_LARGE),
    ("linear of a billion features", _net(nn.Linear(2, 2), in_features=_HUGE), "cannot be guessed"),
    ("program with a giant input", _wide_program, _TOO_LARGE),
    ("program with a giant batch", _hint_program, _TOO_LARGE),
    ("graph that fills a tensor", fused_graph(_call("aten.full.default", [1 << 40], 1.0)), _TOO_LARGE),
    ("graph that repeats a weight", fused_graph(_call("aten.repeat.default", _WEIGHT, [1 << 32])), _TOO_LARGE),
    ("graph that expands a weight",
     fused_graph(_call("aten.expand.default", _WEIGHT, [1 << 32, 4]), _call("aten.mul.Tensor", {"node": 2}, 2.0)),
     _TOO_LARGE),
    ("graph that pads its input", fused_graph(_call("aten.constant_pad_nd.default", _INPUT, [0, 1 << 34])), _TOO_LARGE),
    ("graph of an outer product",
     fused_graph(_call("aten.arange.default", 1 << 17), _call("aten.outer.default", {"node": 2}, {"node": 2})),
     _TOO_LARGE),
    ("graph with a giant input",
     fused_graph(_call("aten.relu.default", _INPUT), example=(1 << 20, 1 << 14)), _TOO_LARGE),
]  # fmt: skip


def _doubled(levels: int) -> object:
    """Return tuples that hold the one below them twice: few in a file, and 2**levels once written out."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


def _long_key(path: Path) -> None:
    # One text of a megabyte, a hundred thousand times in one key.
    text = b"\x80\x02}(X" + struct.pack("<I", 1 << 20) + b"n" * (1 << 20) + b"q\x00" + b"h\x00" * 100_000 + b"tK\x01s."
    checkpoint(path, text)


def _program_of_objects(path: Path) -> None:
    graph = b'{"graph_module":{"graph":{"inputs":[' + b"{}," * 5_000_000 + b"{}]}}}"
    members = {**containers.exported(), containers.MODEL: graph, "extra/noise": random.Random(0).randbytes(2 << 20)}
    zip_file(path, {f"net/{name}": content for name, content in members.items()}, zipfile.ZIP_DEFLATED)


def _header_of_entries(path: Path) -> None:
    entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header_file(("{" + ",".join(entry % n for n in range(400_000)) + "}").encode(), 0)(path)


def _graph_of_lists(path: Path) -> None:
    fused_graph(_call("aten.relu.default", [[]] * 2_000_000))(path)


def _all_at_once(path: Path) -> None:
    # Each tensor is within the limit, and all are alive before the first is added up.
    fills = [_call("aten.mul.Tensor", _INPUT, float(n)) for n in range(1, 500)]
    sums = [_call("aten.add.Tensor", {"node": 2 + n}, {"node": 1 + n + 499 if n else 2}) for n in range(499)]
    fused_graph(*fills, *sums, example=(2, 1 << 20))(path)


def _constants_at_once(path: Path) -> None:
    fills = [_call("aten.full.default", [1 << 20], float(n)) for n in range(1, 500)]
    sums = [_call("aten.add.Tensor", {"node": 2 + n}, {"node": 1 + n + 499 if n else 2}) for n in range(499)]
    scaled = _call("aten.mul.Tensor", _INPUT, {"node": 999})
    fused_graph(*fills, *sums, scaled, example=(2, 1 << 20))(path)


def _dilated(path: Path) -> None:
    # One kernel for both would have 8001 x 8001 elements.
    def conv(dilation: int) -> dict[str, Any]:
        steps = [dilation, dilation]
        return _call("aten.conv2d.default", _INPUT, {"node": 3}, None, [1, 1], steps, steps)

    square = _call("aten.reshape.default", _WEIGHT, [1, 1, 2, 2])
    kernel = _call("aten.constant_pad_nd.default", {"node": 2}, [0, 1, 0, 1])
    total = _call("aten.add.Tensor", {"node": 4}, {"node": 5})
    fused_graph(square, kernel, conv(1), conv(4000), total, example=(2, 1, 9, 9))(path)


def _bomb(path: Path) -> None:
    zip_file(path, {"archive/data.pkl": pickled({}), "archive/data/0": bytes(256 << 20)}, zipfile.ZIP_DEFLATED)


def _pickle_bomb(path: Path) -> None:
    # 60 MB of a pickle in 60 kB: below the limit for one pickle, above what the file may claim.
    zip_file(path, {"archive/data.pkl": b"\x80\x02" + b"N0" * (30 << 20) + b"}."}, zipfile.ZIP_DEFLATED)


def _many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({}))
        for index in range(65_000):
            archive.writestr(f"archive/data/{index}", b"")


def _claimed_members(path: Path) -> None:
    checkpoint(path, pickled({}))
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 12] = b"\xff\xfe\xff\xfe"
    path.write_bytes(content)


def _many_layers(path: Path) -> None:
    net = make_net()
    for index in range(2000):
        net.add_module(f"r{index}", nn.Identity())
    torch.save(net, path)


ARCHIVES = [
    ("zip bomb", _bomb, "compressed members claim"),
    ("zip bomb of a pickle", _pickle_bomb, "compressed members claim"),
    ("65,000 empty members", _many_members, "holds no weights"),
    ("65,279 members claimed", _claimed_members, "holds no weights"),
    ("key of 100 GB", _long_key, "as a key"),
    *(
        (f"{attribute} that doubles {levels} times", _net(nn.Conv2d(1, 1, 1), **{attribute: _doubled(levels)}), reason)
        for attribute in ("padding", "in_channels", "kernel_size", "padding_mode", "note")
        for levels, reason in ((60, "repeats values so often"), (18, "values in lists"), (12, ""))
    ),
    ("name that doubles", _net(nn.Conv2d(1, 1, 1), _modules={"0": None, _doubled(3): None}), "as a key"),
    ("program of five million objects", _program_of_objects, "parts; needed: at most"),
    ("header of 400,000 entries", _header_of_entries, "parts; needed: at most"),
    ("graph of two million lists", _graph_of_lists, "parts; needed: at most"),
    ("graph of many tensors at once", _all_at_once, _TOO_LARGE),
    ("graph of many constants at once", _constants_at_once, _TOO_LARGE),
    ("dilations that merge into a giant kernel", _dilated, ""),
    ("2,000 layers that do nothing", _many_layers, None),
]

CASES = tuple(Case(name, write, reason) for name, write, reason in (*PICKLES, *GRAPHS, *ARCHIVES))
