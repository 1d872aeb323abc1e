"""Fuse unfused ONNX exports of real models, and time both files: onnxruntime and OpenVINO, interleaved, as ratios.

Prints a Markdown table. The exports are truly unfused: torch's exporter folds norms into convolutions unless it is
told not to. Run it as ``python -m benchmarks.onnx_files [NAME ...] [--folder DIR]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"

import numpy as np
import onnx
import torch
from onnxscript import optimizer
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import repconv_cli
from benchmarks.zoo import ZooModel, find
from repconv_cli.facts import totals
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.trace import trace
from repconv_cli.timing.rounds import take_turns

NAMES = ("timm:repvgg_a0", "timm:mobileone_s1", "timm:fastvit_t8", "transformers:rt_detr_r18")
Run = Callable[[], object]


def export_unfused(model: ZooModel, module: nn.Module, path: Path) -> None:
    """Write ``module`` as ONNX with every norm and branch that it has, its batch free."""
    args, kwargs = model.example()
    free: Any = tuple({0: Dim.AUTO} for _ in args) or {name: {0: Dim.AUTO} for name in kwargs}
    with torch.no_grad():
        exported = torch.export.export(module, args, kwargs, strict=False, dynamic_shapes=free)
        program = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    # Only what constants decide, which OpenVINO does not read otherwise; this merges nothing.
    optimizer.fold_constants(program.model, output_size_limit=1 << 20)
    optimizer.remove_unused_nodes(program.model)
    program.save(path)


def convolutions_by_torch(model: ZooModel, module: nn.Module) -> int | None:
    """Return how many convolutions the torch road leaves."""
    args, kwargs = model.example()
    return totals(make_plan(trace(module, args, kwargs))).convs.after


def in_onnxruntime(path: Path, feed: list[np.ndarray]) -> Run:
    """Return one call of the model in onnxruntime at its highest level, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    named = {info.name: value for info, value in zip(session.get_inputs(), feed, strict=True)}
    return lambda: session.run(None, named)


def in_openvino(path: Path, feed: list[np.ndarray]) -> Run:
    """Return one call of the model in OpenVINO, on one thread, in float32."""
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": "1", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda: request.infer(feed)


RUNTIMES: dict[str, Callable[[Path, list[np.ndarray]], Run]] = {"onnxruntime": in_onnxruntime}
if importlib.util.find_spec("openvino") is not None:
    RUNTIMES["openvino"] = in_openvino


def gain(
    make: Callable[[Path, list[np.ndarray]], Run], before: Path, after: Path, feed: list[np.ndarray], rounds: int
) -> str:
    """Return how many times as fast ``after`` is, the 95 % interval, and its milliseconds."""
    try:
        loads = {"original": partial(make, before, feed), "repconv": partial(make, after, feed)}
        found = take_turns(loads, threads=1, seconds=math.inf, rounds=rounds)
    except Exception as error:  # noqa: BLE001 - a runtime that does not take the model at all
        return f"– ({str(error).splitlines()[0][:60]})"
    ratio = found.ratio("original", "repconv")
    return f"{ratio.median:.3f}× ({ratio.low:.3f}–{ratio.high:.3f}), {found.milliseconds('repconv'):.1f} ms"


def row(name: str, folder: Path, rounds: int) -> str:
    """Return one model's line of the table."""
    model = find(name)
    module = model.build()
    before, after = (folder / f"{name.split(':')[1]}{end}" for end in (".onnx", ".fused.onnx"))
    export_unfused(model, module, before)
    result = repconv_cli.fuse(before, after, force=True)
    counts = [sum(node.op_type == "Conv" for node in onnx.load(path).graph.node) for path in (before, after)]
    leaves = pytree.tree_leaves(model.example())
    feed = [leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    gains = [gain(make, before, after, feed, rounds) for make in RUNTIMES.values()]
    assert result.totals is not None
    assert result.verification is not None
    ops = result.totals.ops
    cells = [
        name,
        f"{counts[0]} → {counts[1]}",
        str(convolutions_by_torch(model, module)),
        f"{ops.before} → {ops.after}",
        f"{result.verification.verdict}, {result.verification.ratio or 0:.1f}× noise",
        *gains,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are kept")
    parser.add_argument("--rounds", type=int, default=101, help="of both files in turns, in each runtime")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        heads = ["model", "Conv nodes", "torch road", "operations", "verdict", *RUNTIMES]
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for name in options.names:
            print(row(name, folder, options.rounds), flush=True)


if __name__ == "__main__":
    main()
