"""Latency of the same model in several forms, side by side: interleaved rounds, ratios per round, one thread."""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.record import Latency, Spread

ROUNDS = 15
SECONDS_PER_RUNTIME = 6.0
_SECONDS_PER_SAMPLE = 0.03

Run = Callable[[], object]


def measure_eager(modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Latency:
    """Return the latencies of ``modules`` ("original", "repconv", perhaps "own") in torch eager."""

    def runner(module: nn.Module) -> Run:
        return lambda: module(*args, **kwargs)

    with torch.inference_mode():
        return compare({name: runner(module) for name, module in modules.items()})


def measure_onnx(modules: dict[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Latency:
    """Return the latencies of ``modules`` in onnxruntime at its highest optimisation level."""
    return compare({name: _session(module, args, kwargs) for name, module in modules.items()})


def _session(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_as_onnx(module, args, kwargs), options, ["CPUExecutionProvider"])
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    feed = {info.name: leaf.numpy() for info, leaf in zip(session.get_inputs(), leaves, strict=True)}
    return lambda: session.run(None, feed)


def _as_onnx(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return ``module`` as ONNX, by torch's own exporter at fixed sizes."""
    # transformers checks sizes at run time with an operator that the exporter does not know.
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    with torch.no_grad():
        exported = torch.export.export(module, args, kwargs, strict=False)
        program = torch.onnx.export(exported, dynamo=True, optimize=True, verbose=False)
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)
    return buffer.getvalue()


def compare(runs: dict[str, Run]) -> Latency:
    """Return how many times as long as "repconv" the others take, from interleaved rounds of equal length."""
    repeats = {name: _repeats(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + SECONDS_PER_RUNTIME
    for done in range(ROUNDS):
        # The order changes, so that no form always runs on what another left in the caches.
        names = list(runs)[done % len(runs) :] + list(runs)[: done % len(runs)]
        for name in names:
            times[name].append(_seconds(runs[name], repeats[name]))
        if time.perf_counter() > until and done >= 4:
            break
    own = _spread(times["own"], times["repconv"]) if "own" in times else None
    milliseconds = 1e3 * statistics.median(times["repconv"])
    return Latency(milliseconds, _spread(times["original"], times["repconv"]), own)


def _repeats(run: Run) -> int:
    """Warm up, and return how many calls make one sample."""
    for _ in range(2):
        run()
    return max(1, round(_SECONDS_PER_SAMPLE / _seconds(run, 2)))


def _seconds(run: Run, repeats: int) -> float:
    """Return the processor time of one call: with one thread it is the latency, less what other programs take."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def _spread(times: list[float], reference: list[float]) -> Spread:
    """Return median and quartiles of the ratios of samples taken in the same round."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, reference, strict=True)], n=4)
    return Spread(low, median, high)
