"""``verify`` with a hostile OUT: refused, or a failure, never a bug or a lot of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cli.runs import run
from tests.hostile.case import make_net
from tests.hostile.judge import MOST_MEGABYTES, MOST_SECONDS, PeakMemory, at_most


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    torch.save(make_net(), folder / "net.pt")
    assert run("fuse", folder / "net.pt", folder / "net.safetensors", "--input", "2,1,8,8").exit_code == 0
    return folder / "net.pt", folder / "net.safetensors"


def appended(*nodes: dict[str, Any]) -> Any:
    """Return an edit that puts calls between the last node and the result; ``-1`` refers to the node before."""

    def edit(graph: dict[str, Any]) -> None:
        for node in nodes:
            before = {"node": len(graph["nodes"]) - 1}
            graph["nodes"].append({**node, "args": [before if arg == -1 else arg for arg in node["args"]]})
        graph["results"] = [{"node": len(graph["nodes"]) - 1}]

    return edit


def call(op: str, *args: Any) -> dict[str, Any]:
    return {"op": f"aten.{op}", "args": list(args)}


def inputs(**changed: Any) -> Any:
    return lambda graph: graph["inputs"][0].update(changed)


GRAPHS = [
    ("doubled", appended(call("mul.Tensor", -1, 2.0)), 1, ""),
    ("NaN", appended(call("mul.Tensor", -1, {"float": "nan"})), 1, ""),
    ("giant pad", appended(call("constant_pad_nd.default", -1, [0, 1 << 34])), 2, "makes a tensor of"),
    ("giant fill", appended(call("full.default", [1 << 40], 1.0)), 2, "makes a tensor of"),
    ("giant values thrown away",
     appended(call("full.default", [1 << 34], 1.0), call("sum.default", -1)), 2, "makes a tensor of"),
    ("shapes that do not fit", appended(call("reshape.default", -1, [7, 7, 7])), 2, "does not fit together"),
    ("too few arguments", appended(call("conv2d.default", -1)), 2, "does not fit together"),
    ("index out of range", appended(call("select.int", -1, 0, 99)), 2, "does not fit together"),
    ("large pad", appended(call("constant_pad_nd.default", -1, [0, 1 << 20])), 2, "elements; needed: at most"),
    ("values as indices", appended(call("embedding.default", {"node": 1}, -1)), 2, "does not fit together"),
    ("another rank", appended(call("sum.default", -1)), 1, ""),
    ("another type", appended(call("argmax.default", -1)), 1, ""),
    ("two outputs", lambda graph: graph["results"].append(graph["results"][0]), 2, "how it says that they nest"),
    ("another input", inputs(example=[2, 9, 8, 8], shape=[None, 9, None, None]), 2, "does not fit together"),
    ("input of another type", inputs(dtype="int64"), 2, "does not fit together|its inputs are"),
    ("sizes that are negative", inputs(shape=[-1, -1, -1, -1]), 2, "its input is -1×-1"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "code", "reason"), [g[1:] for g in GRAPHS], ids=[g[0] for g in GRAPHS])
def test_a_hostile_output_is_refused_or_fails(  # type: ignore[no-untyped-def]
    pair: tuple[Path, Path], tmp_path: Path, edit, code: int, reason: str
) -> None:
    source, good = pair
    with safe_open(good, "pt") as opened:
        notes, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    graph = json.loads(notes["repconv.graph"])
    edit(graph)
    save_file(tensors, tmp_path / "bad.safetensors", {**notes, "repconv.graph": json.dumps(graph)})
    peak = PeakMemory()
    with at_most(MOST_SECONDS):
        done = run("verify", source, tmp_path / "bad.safetensors", "--input", "2,1,8,8")
    assert done.exit_code == code, done.output
    assert re.search(reason, done.output), done.output
    assert "Traceback" not in done.output
    assert peak.megabytes() < MOST_MEGABYTES
