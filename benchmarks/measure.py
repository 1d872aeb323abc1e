"""Measure one model of the catalogue in a process of its own: ``python benchmarks/measure.py NAME OUT.json``."""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from repconv_cli.allocation import return_large_blocks, suit_model  # noqa: E402

# As the command does, before torch takes memory.
return_large_blocks()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import latency  # noqa: E402
from benchmarks.record import Counts, Record  # noqa: E402
from benchmarks.zoo import ZooModel, find  # noqa: E402
from repconv_cli.graph.fuse import Fused, fuse_program  # noqa: E402
from repconv_cli.graph.interpret import run_program  # noqa: E402
from repconv_cli.graph.kept import in_eval_mode  # noqa: E402
from repconv_cli.graph.plan import count_ops, make_plan  # noqa: E402
from repconv_cli.graph.program import Program, ProgramModule  # noqa: E402
from repconv_cli.graph.trace import trace  # noqa: E402
from repconv_cli.verdict import proof_inputs  # noqa: E402


def measure(model: ZooModel, *, with_latency: bool, write: Callable[[Record], None]) -> None:
    """Fill a record step by step, and ``write`` it after each: what was measured survives a crash of the next step."""
    record = Record(
        name=model.name,
        commit=_commit(),
        own_name=model.own.name if model.own else None,
        convs_by_hand=model.convs_by_hand,
    )
    module = model.build()
    modules: dict[str, nn.Module] = {"original": module}
    with _step(record, write, "repconv"):
        record.export_seconds = _seconds_of_export(module, model)
        program = _measure_trace(record, module, model)
        record.before = count(program, module, model)
        fused = _measure_fuse(record, program)
        modules["repconv"] = ProgramModule(fused.program)
        record.after = count(fused.program, modules["repconv"], model)
        record.float32_difference = _difference(model, module, modules["repconv"])
    with _step(record, write, f"the library's own converter ({record.own_name})"):
        own = model.build_own(module)
        if own is not None:
            record.own = count(_trace_at_fixed_sizes(own, model), own, model)
            modules["own"] = own
    if with_latency and "repconv" in modules:
        # A model whose batch is fixed runs at that of the example.
        is_free = all(info.shape[0] is None for info in program.inputs)
        args, kwargs = model.example(batch=1) if is_free else model.example()
        with _step(record, write, "latency in torch"):
            record.eager = latency.measure("eager", modules, args, kwargs)
        with _step(record, write, "latency in onnxruntime"):
            record.onnx = latency.measure("onnxruntime", modules, args, kwargs)


@contextmanager
def _step(record: Record, write: Callable[[Record], None], what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a model that fails is a result
        record.problems.append(f"{what}: {_one_line(error)}")
    write(record)


def _commit() -> str:
    """Return the commit that is measured, with a mark where files differ from it, but for the table being written."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/RESULTS.md")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text[:200]


def _seconds_of_export(module: nn.Module, model: ZooModel) -> float:
    """Return the seconds of a plain ``torch.export`` at fixed sizes: the yardstick for what is ours."""
    torch.export.export(nn.ReLU(), (torch.zeros(2),), strict=False)  # the first call loads half of torch
    args, kwargs = model.example()
    with in_eval_mode(module):
        start = time.process_time()
        torch.export.export(module, args, kwargs, strict=False)
        return time.process_time() - start


def _measure_trace(record: Record, module: nn.Module, model: ZooModel) -> Program:
    args, kwargs = model.example()
    start = time.process_time()
    program = trace(module, args, kwargs)
    record.trace_seconds = time.process_time() - start
    record.notes.extend(program.notes)
    record.weight_bytes = sum(t.numel() * t.element_size() for t in program.tensors.values())
    return program


def _trace_at_fixed_sizes(module: nn.Module, model: ZooModel) -> Program:
    """Trace ``module`` to count it: with no size free that takes a fraction of the time, and never more operations."""
    args, kwargs = model.example()
    fixed = tuple((False,) * getattr(leaf, "ndim", 0) for leaf in pytree.tree_leaves((args, kwargs)))
    return trace(module, args, kwargs, may_vary=fixed)


def _measure_fuse(record: Record, program: Program) -> Fused:
    """Time the plan alone, then kernels, certificates and rewrite, then all of it with the whole-model proof."""
    start = time.process_time()
    make_plan(program)
    record.plan_seconds = time.process_time() - start
    inputs = list(proof_inputs(program, seed=0))
    _load_the_rest(program, inputs)
    suit_model(record.weight_bytes)
    before = _start_peak()
    start = time.process_time()
    fused = fuse_program(program, inputs, dtype=program.dtype())
    record.all_seconds = time.process_time() - start
    record.peak_bytes = _peak() - before
    start = time.process_time()
    fuse_program(program, [], dtype=program.dtype())
    record.fuse_seconds = time.process_time() - start
    record.blocks = len(fused.plan.blocks)
    record.certificate = max((c.error for c in fused.certificates), default=0.0)
    record.float64_difference = fused.float64_error
    return fused


def _load_the_rest(program: Program, inputs: list[tuple[Tensor, ...]]) -> None:
    """Fuse a small net and run the model in float64: what torch loads and keeps for its first run belongs to no model.

    That is its code for these operators, some MiB, and the buffers of the first large product.
    """
    small = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(512, 8))
    traced = trace(small.eval(), (torch.randn(2, 3, 8, 8),))
    fuse_program(traced, list(proof_inputs(traced, seed=0)), dtype=traced.dtype())
    large = torch.randn(1024, 1024, dtype=torch.float64)
    large @ large
    with torch.no_grad():
        run_program(program, inputs[0])


def _start_peak() -> int:
    """Start a new peak of the resident memory, and return what is resident now, in bytes."""
    gc.collect()
    # What tracing freed goes back to the system first, else the peak hides in it.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def count(program: Program, module: nn.Module, model: ZooModel) -> Counts:
    """Return what ``program``, traced from ``module``, is made of; parameters are those that its graph reads.

    Multiply-accumulates are counted by torch while ``module`` runs: the same judge for all forms, and none of ours.
    """
    args, kwargs = model.example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    samples = pytree.tree_leaves((args, kwargs))[0].shape[0]
    return Counts(
        **count_ops(program),
        params=sum(program.tensors[key].numel() for key in read & program.parameters),
        macs=counter.get_total_flops() // (2 * samples),
    )


def _difference(model: ZooModel, module: nn.Module, fused: nn.Module) -> float:
    """Return the largest difference of any judged output in the model's own dtype, relative to its range."""
    args, kwargs = model.example(seed=7)
    with torch.no_grad():
        expected, found = model.judged(module(*args, **kwargs)), model.judged(fused(*args, **kwargs))
    return max(_relative(a, b) for a, b in zip(expected, found, strict=True))


def _relative(expected: Tensor, found: Tensor) -> float:
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    spread = float(expected[finite].abs().max())
    difference = float((found - expected)[finite].abs().max())
    return difference / spread if spread else difference


def main(argv: list[str] | None = None) -> None:
    """Measure one model and write its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure(find(options.name), with_latency=not options.no_latency, write=lambda record: record.write(options.out))


if __name__ == "__main__":
    main()
