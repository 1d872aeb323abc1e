"""Memory and time of large files: inspecting, reading with every check and writing, and fusing weights alone.

    python benchmarks/large_files.py --gigabytes 2

Makes a RepVGG-like checkpoint of random weights in a temporary folder (``.safetensors``, the same as ``.pth``, and a
sparse ``.safetensors`` of five times the size), measures each step in a process of its own, prints a table, and
deletes the files. Peak memory is ``VmHWM``, which counts the pages of mapped files too. Fusing may take what an idle
start takes, 200 MB and the largest block, in 1.5 times the time of torch.load + save_file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHANNELS = 1024
COPY = "torch.load + save_file, .pth"
_BLOCK_BYTES = 4 * CHANNELS * CHANNELS * 10

_REPORT = """
import json, time, sys
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps([int(status['VmHWM'].split()[0]) / 1024, seconds, 'torch' in sys.modules]))
"""


@dataclass(frozen=True)
class Step:
    """One row: what is measured, as the body of a script of its own."""

    name: str
    body: str


def steps(folder: Path, sparse: Path) -> Iterator[Step]:
    """Yield what is measured, the yardsticks first."""
    stored, pickled, out = folder / "w.safetensors", folder / "w.pth", folder / "out.safetensors"
    read = "from repconv_cli.checkpoint import read, write_safetensors"
    yield Step("idle start", f"{read}\nimport torch, safetensors.torch")
    inspect = "from repconv_cli.cli.main import app\nfrom typer.testing import CliRunner\n"
    inspect += "done = CliRunner().invoke(app, ['inspect', {!r}, '--json'])\nassert done.exit_code == 0, done.output"
    yield Step(f"inspect, {sparse.stat().st_size / 1e9:.0f} GB .safetensors (sparse)", inspect.format(str(sparse)))
    yield Step("inspect, .safetensors", inspect.format(str(stored)))
    yield Step("inspect, .pth", inspect.format(str(pickled)))
    load = "import torch\nfrom safetensors.torch import load_file, save_file\n"
    save = f"save_file(found, {str(out)!r})"
    yield Step(COPY, f"{load}found = torch.load({str(pickled)!r})\n{save}")
    yield Step("load_file + save_file, .safetensors", f"{load}found = load_file({str(stored)!r})\n{save}")
    for name, path in ((".pth", pickled), (".safetensors", stored)):
        body = f"{read}\nfound = read({str(path)!r})\n"
        body += f"write_safetensors({str(out)!r}, found.tensors, {{}}, force=True, release=found.release)"
        yield Step(f"read, check, write, read back, {name}", body)
    for name, path in ((".pth", pickled), (".safetensors", stored)):
        body = (
            f"import sys\nfrom repconv_cli.cli.main import run\nsys.argv[1:] = ['fuse', {str(path)!r}, {str(out)!r}, "
        )
        body += "'--force', '--quiet']\ntry:\n    run()\nexcept SystemExit as done:\n    assert not done.code"
        yield Step(f"fuse, {name}", body)


def tensors(blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a RepVGG's training branches."""
    for n in range(blocks):
        for branch, size in (("rbr_dense", 3), ("rbr_1x1", 1)):
            yield f"stage1.{n}.{branch}.conv.weight", (CHANNELS, CHANNELS, size, size)
            for part in ("weight", "bias", "running_mean", "running_var"):
                yield f"stage1.{n}.{branch}.bn.{part}", (CHANNELS,)


def make(folder: Path, blocks: int) -> None:
    """Write the random checkpoint in both containers."""
    import torch
    from safetensors.torch import save_file

    state = {name: torch.rand(shape) + 0.1 for name, shape in tensors(blocks)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pth")


def make_sparse(path: Path, blocks: int) -> None:
    """Write a safetensors file whose tensors are one hole: no disk space, any size."""
    table, end = {}, 0
    for name, shape in tensors(blocks):
        count = 4
        for size in shape:
            count *= size
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def measure(step: Step) -> tuple[float, float, bool]:
    """Return (peak in MiB, seconds, whether torch was imported) of a step run in a process of its own."""
    command = [sys.executable, "-c", _REPORT.format(body=step.body)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{step.name}: {done.stderr[-500:]}")
    peak, seconds, has_torch = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds, has_torch


def main(argv: list[str] | None = None) -> None:
    """Make the files, measure, print the table, and delete the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each step in turn; the fastest counts.")
    parser.add_argument("--folder", type=Path, help="Where the files are made; a temporary folder by default.")
    options = parser.parse_args(argv)
    blocks = max(1, round(options.gigabytes * 1e9 / _BLOCK_BYTES))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder, blocks)
        make_sparse(folder / "sparse.safetensors", 5 * blocks)
        print(
            f"{(folder / 'w.safetensors').stat().st_size / 1e9:.1f} GB of float32 weights in {blocks} blocks "
            f"of {_BLOCK_BYTES / 1e6:.0f} MB\n"
        )
        runs: dict[str, list[tuple[float, float, bool]]] = {}
        for _ in range(options.repeats):
            for step in steps(folder, folder / "sparse.safetensors"):
                runs.setdefault(step.name, []).append(measure(step))
        print_table(runs)


def print_table(runs: dict[str, list[tuple[float, float, bool]]]) -> None:
    """Print the highest peak and the shortest time of each step."""
    print("| step | peak memory, MiB | above idle | seconds | of torch's copy | torch |\n|---|---|---|---|---|---|")
    idle = min(peak for peak, _, _ in runs["idle start"])
    copy = min(seconds for _, seconds, _ in runs[COPY])
    for name, measured in runs.items():
        peak, seconds = max(run[0] for run in measured), min(run[1] for run in measured)
        torch = "imported" if measured[0][2] else "–"
        print(f"| {name} | {peak:.0f} | {peak - idle:+.0f} | {seconds:.2f} | {seconds / copy:.2f}× | {torch} |")


if __name__ == "__main__":
    main()
