"""The file alone is the model: ``python benchmarks/run_anywhere.py`` writes ``benchmarks/ANYWHERE.md``.

Each model of the catalogue is fused into a file. Another interpreter, in which no model library can be imported, loads
that file, makes an ONNX file of it with ``fuse``, and runs both, torch and onnxruntime, at several batch sizes. All
outputs are compared with those of the original.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402

BATCHES = (1, 2, 5)
BLOCKED = ("timm", "transformers", "ultralytics", "torchvision")
SECONDS_PER_MODEL = 400


def make(name: str, folder: Path) -> None:
    """Fuse one model into ``folder``, with inputs and the original's outputs beside it."""
    import repconv_cli
    from benchmarks.zoo import find

    model = find(name)
    module = model.build()
    args, kwargs = model.example()
    result = repconv_cli.fuse(module, folder / "model.safetensors", args=args, kwargs=kwargs, samples=1)
    free = all(shape[0] is None for shape in result.input.shapes)
    calls = []
    for batch in BATCHES if free else (2,):
        args, kwargs = model.example(batch=batch, seed=batch)
        with torch.no_grad():
            calls.append((args, kwargs, [o.double() for o in model.judged(module(*args, **kwargs))]))
    torch.save({"calls": calls, "before_choice": model.before_choice}, folder / "calls.pt")
    (folder / "noise.json").write_text(json.dumps(_noise(module, calls, model.judged)))
    (folder / "fuse.json").write_text(
        json.dumps({"verdict": result.verification.verdict, "ops": result.totals.ops.after})
    )


def _noise(module: Any, calls: list[Any], judged: Any) -> float | None:
    """Return how far the original is from its own run in float64: the yardstick. None if it does not run there."""
    exact = copy.deepcopy(module).double()
    worst = 0.0
    for args, kwargs, expected in calls:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(doubled, spec)
        try:
            with torch.no_grad():
                worst = max(worst, _difference([o.double() for o in judged(exact(*args, **kwargs))], expected))
        except RuntimeError:
            # Some models make float32 themselves on the way.
            return None
    return worst


def use(folder: Path) -> None:
    """Load the file where no model library can be imported, and compare what it computes."""
    for name in BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    import repconv_cli
    from repconv_cli.onnx.exporter import cause_of

    torch.set_num_threads(1)
    model = repconv_cli.load(folder / "model.safetensors")
    saved = torch.load(folder / "calls.pt", weights_only=True)
    found: dict[str, Any] = {"batches": [], "torch": 0.0, "onnx": None}
    for args, kwargs, expected in saved["calls"]:
        with torch.no_grad():
            outputs = _judged(model(*args, **kwargs), saved["before_choice"])
        found["torch"] = max(found["torch"], _difference(expected, outputs))
        found["batches"].append(len(pytree.tree_leaves((args, kwargs))[0]))
    (folder / "use.json").write_text(json.dumps(found))
    try:
        found["onnx"] = _in_onnxruntime(folder, model, saved)
    except Exception as error:  # noqa: BLE001 - a model that the exporter cannot take is a result
        first = cause_of(error)
        found["problem"] = f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}"[:160]
    (folder / "use.json").write_text(json.dumps(found))


def _in_onnxruntime(folder: Path, model: Any, saved: dict[str, Any]) -> float:
    """Return the largest difference of the ONNX file that ``fuse`` makes of the loaded one, at every batch size."""
    import onnx

    import repconv_cli
    from repconv_cli.onnx.session import Session
    from repconv_cli.outputs import RuntimeModel

    repconv_cli.fuse(folder / "model.safetensors", folder / "model.onnx", samples=1)
    program = model.held_program
    run = RuntimeModel(Session(onnx.load(folder / "model.onnx"), folder), program)
    worst = 0.0
    for args, kwargs, expected in saved["calls"]:
        outputs = program.outputs.unflatten(iter(run(*args, **kwargs)))
        worst = max(worst, _difference(expected, _judged(outputs, saved["before_choice"])))
    return worst


def _judged(outputs: Any, names: tuple[str, ...]) -> list[Tensor]:
    if names:
        outputs = [outputs[name] for name in names]
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference of any output, relative to its range."""
    worst = 0.0
    for reference, value in zip(expected, found, strict=True):
        finite = torch.isfinite(reference)
        if not torch.equal(finite, torch.isfinite(value)):
            return float("inf")
        spread = float(reference[finite].abs().max()) or 1.0
        worst = max(worst, float((value.double() - reference)[finite].abs().max()) / spread)
    return worst


def main(argv: list[str] | None = None) -> None:
    """Run every model through both interpreters, one after the other, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="other models keep their rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "ANYWHERE.md")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if options.step:
        step, name, folder = options.step
        make(name, Path(folder)) if step == "make" else use(Path(folder))
        return
    from benchmarks.zoo import CATALOGUE

    names = [model.name for model in CATALOGUE]
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in options.only)]
    rows = {name: row for name, row in _rows_of(options.out) if name not in chosen}
    for name in chosen:
        rows[name] = _row(name)
        print(rows[name], file=sys.stderr, flush=True)
        options.out.write_text(_page([rows[name] for name in names if name in rows]))


def _rows_of(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the models of an earlier page and their rows: what is not run again stays."""
    for line in page.read_text().splitlines() if page.exists() else ():
        if line.startswith("| `"):
            yield line.split("`")[1], line


def _row(name: str) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for step in ("make", "use"):
            problem = _run(step, name, folder)
            if problem and not (folder / "use.json").exists():
                return f"| `{name}` | – | – | – | – | {step}: {problem} |"
        used = json.loads((folder / "use.json").read_text())
        noise = json.loads((folder / "noise.json").read_text())
    batches = ", ".join(map(str, used["batches"]))
    figures = " | ".join("–" if f is None else f"{f:.0e}" for f in (used["torch"], used["onnx"], noise))
    return f"| `{name}` | {batches} | {figures} | {used.get('problem', '')} |"


def _run(step: str, name: str, folder: Path) -> str | None:
    command = [sys.executable, __file__, "--step", step, name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_MODEL, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS_PER_MODEL} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit {done.returncode}")[:200]


def _page(rows: list[str]) -> str:
    return "\n".join([
        "# The file alone is the model", "",
        "Written by `python benchmarks/run_anywhere.py`; do not edit.", "",
        (__doc__ or "").partition("\n\n")[2].strip(), "",
        "Differences are the largest of any output at any batch size, relative to its range, in float32; of models",
        "that pick their top k, the outputs before that. *original*: how far the original itself is from its own run",
        "in float64, which is what rounding does to it.", "",
        "| model | batch sizes | loaded file | onnxruntime | original | |",
        "|---|---|---:|---:|---:|---|",
        *rows, "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
