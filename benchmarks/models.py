"""Fuse real model classes and compare with their libraries' own converters: writes ``benchmarks/RESULTS.md``.

    python benchmarks/models.py [--only GLOB] [--no-latency] [--out FILE] [--records FOLDER [--resume]]

Each model runs in a process of its own, one after the other, so that a crash or a hang costs that model alone and peak
memory is its own. Needs ``pip install -e '.[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import Record  # noqa: E402
from benchmarks.table import render  # noqa: E402
from benchmarks.zoo import CATALOGUE, ZooModel  # noqa: E402

# Of the clock, with room for other work on the machine: the slowest takes about 150 s of the processor.
SECONDS_PER_MODEL = 600
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "ultralytics", "onnx", "onnxruntime", "numpy")


def main(argv: list[str] | None = None) -> None:
    """Measure the catalogue and write the tables."""
    options = _parse(argv)
    models = [model for model in CATALOGUE if fnmatchcase(model.name, options.only)]
    if not models:
        raise SystemExit(f"--only {options.only!r} matches no model, needed names such as {CATALOGUE[0].name}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.records or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for index, model in enumerate(models, start=1):
            print(f"[{index}/{len(models)}] {model.name}", file=sys.stderr, flush=True)
            path = folder / f"{model.name.replace(':', '_')}.json"
            if not (options.resume and path.exists()):
                measure_apart(model, path, with_latency=not options.no_latency)
            records.append(Record.read(path))
            # After each model, so that an interrupted run leaves what it has.
            options.out.write_text(render(records, _header(argv if argv is not None else sys.argv[1:], records)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="measure only models whose name matches")
    parser.add_argument("--no-latency", action="store_true", help="counts, exactness and time of conversion only")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "RESULTS.md", help="the markdown to write")
    parser.add_argument("--records", type=Path, help="keep the measured records, as JSON, in this folder")
    parser.add_argument("--resume", action="store_true", help="measure only models without a record in that folder")
    return parser.parse_args(argv)


def measure_apart(model: ZooModel, path: Path, *, with_latency: bool) -> None:
    """Write the record of ``model``, measured in another process, to ``path``; ``problems`` tell what failed there."""
    path.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "measure.py"), model.name, str(path)]
    problem = _run([*command, *([] if with_latency else ["--no-latency"])])
    if problem or not path.exists():
        record = Record.read(path) if path.exists() else Record(model.name, convs_by_hand=model.convs_by_hand)
        record.problems.append(problem or "nothing was written")
        record.write(path)


def _run(command: list[str]) -> str | None:
    """Run ``command``; return in one line what went wrong, or None."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS_PER_MODEL, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {SECONDS_PER_MODEL} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"exit {done.returncode}: {lines[-1][:200]}"


def _header(arguments: list[str], records: list[Record]) -> str:
    command = " ".join(["python benchmarks/models.py", *arguments])
    commits = ", ".join(sorted({record.commit for record in records if record.commit})) or "not known"
    versions = ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)
    return f"""# Real model classes: before, after, and their libraries' own converters

Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}; do not edit.

Machine: {_processor()}, {os.cpu_count()} cores, {platform.system()}. One thread throughout; all
times are processor time, which other work on the machine does not count into.
Measured at commit {commits}. Versions: Python {platform.python_version()}, {versions}.

All weights are random, drawn from a seed, and norm statistics are those of real activations (`benchmarks/randomise.py`
says why). Input sizes are small, so that the whole run takes well under an hour: `benchmarks/zoo.py` lists them.
"""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    main()
