"""The runtimes that a model can be timed in, each as a function from a module to what loads it."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from repconv_cli.errors import InputError
from repconv_cli.graph.kept import in_eval_mode, quiet
from repconv_cli.graph.program import tensors_in
from repconv_cli.onnx.exporter import to_onnx
from repconv_cli.results import RuntimeFacts
from repconv_cli.timing.memory import peak_bytes
from repconv_cli.timing.rounds import Load, Rounds, Run, take_turns

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _eager(module: nn.Module, call: Call, threads: int) -> Load:
    del threads
    args, kwargs = call
    return lambda: lambda: module(*args, **kwargs)


def _compiled(module: nn.Module, call: Call, threads: int) -> Load:
    del threads
    args, kwargs = call
    compiled = torch.compile(module)
    compiled(*args, **kwargs)
    return lambda: lambda: compiled(*args, **kwargs)


def _onnxruntime(module: nn.Module, call: Call, threads: int) -> Load:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    file = as_onnx(module, call)

    def load() -> Run:
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        names = [info.name for info in session.get_inputs()]
        feed = dict(zip(names, (leaf.numpy() for leaf in tensors_in(call)), strict=True))
        return lambda: session.run(None, feed)

    return load


def _openvino(module: nn.Module, call: Call, threads: int) -> Load:
    import openvino

    core = openvino.Core()
    file = as_onnx(module, call)

    def load() -> Run:
        model = core.read_model(io.BytesIO(file))
        compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})
        request = compiled.create_infer_request()
        feed = dict(enumerate(leaf.numpy() for leaf in tensors_in(call)))
        return lambda: request.infer(feed)

    return load


RUNTIMES: dict[str, tuple[Callable[[nn.Module, Call, int], Load], tuple[str, ...]]] = {
    "eager": (_eager, ("torch",)),
    "compile": (_compiled, ("torch",)),
    "onnxruntime": (_onnxruntime, ("onnxruntime", "onnx", "onnxscript")),
    "openvino": (_openvino, ("openvino", "onnx", "onnxscript")),
}
"""By name: how to make a module loadable, and the packages that it takes, its own first."""


def installed(name: str) -> bool:
    """Whether the packages of a runtime are there."""
    return all(importlib.util.find_spec(package) is not None for package in RUNTIMES[name][1])


def choose(asked: tuple[str, ...]) -> list[str]:
    """Return the runtimes to use: those asked for, or all that are installed.

    Raises :class:`InputError` for a name that is unknown or a runtime that is not installed.
    """
    for name in asked:
        if name not in RUNTIMES:
            raise InputError(f"--runtime {name[:40]!r}", needed=f"one of {', '.join(RUNTIMES)}")
        if not installed(name):
            extra = "openvino" if name == "openvino" else "onnx"
            raise InputError(f"{name} is not installed", hint=f"pip install 'repconv-cli[{extra}]'")
    return list(asked) or [name for name in RUNTIMES if installed(name)]


def measure_runtime(
    name: str, original: nn.Module, fused: nn.Module, call: Call, *, threads: int, seconds: float
) -> RuntimeFacts:
    """Return the times of ``original`` and ``fused`` in one runtime, or why there are none."""
    make, packages = RUNTIMES[name]
    runtime = f"{packages[0]} {version(packages[0])}"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode() if name == "eager" else torch.no_grad():
            loads = {"original": make(original, call, threads), "fused": make(fused, call, threads)}
            found = take_turns(loads, threads=threads, seconds=seconds)
            peaks = {form: peak_bytes(load()) for form, load in loads.items()}
    except Exception as error:  # noqa: BLE001 - a runtime that cannot run the model is a result
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return RuntimeFacts(name, runtime, problem=f"{type(error).__name__}: {text}"[:300])
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
    return _facts(name, runtime, found, peaks)


def _facts(name: str, runtime: str, found: Rounds, peaks: dict[str, int | None]) -> RuntimeFacts:
    speedup = found.ratio("original", "fused")
    gain = "gain" if speedup.low > 1 else ("loss" if speedup.high < 1 else "none")
    return RuntimeFacts(
        name,
        runtime,
        original_ms=found.milliseconds("original"),
        fused_ms=found.milliseconds("fused"),
        original_spread_ms=found.spread("original"),
        fused_spread_ms=found.spread("fused"),
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        rounds=found.count,
        gain=gain,
        original_peak_bytes=peaks["original"],
        fused_peak_bytes=peaks["fused"],
    )


def as_onnx(module: nn.Module, call: Call) -> bytes:
    """Return ``module`` as an ONNX file at fixed sizes, by torch's own exporter."""
    # transformers checks sizes at run time with an operator that the exporter does not know.
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    args, kwargs = call
    # A layer that keeps what it computes would keep a tracer's tensor, and be exported with it the next time.
    with in_eval_mode(module), quiet(), torch.no_grad():
        exported = torch.export.export(module, args, kwargs, strict=False)
    content: bytes = to_onnx(exported).SerializeToString()
    return content
