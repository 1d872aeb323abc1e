"""Write the blocks of README.md: ``make readme``.

A block ends with ``<!-- end -->``; what stands before it is replaced. One that starts with ``<!-- output: COMMAND -->``
shows what the command prints, one with ``<!-- results: MODEL, ... -->`` what ``benchmarks/RESULTS.md`` has of these.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- output: (?P<command>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
RESULTS_BLOCK = re.compile(r"(<!-- results: (?P<names>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("model", "convs", "norms", "operations", "parameters, M")
WIDTH = "100"


def shown(command: str) -> str:
    """Return ``command`` and what it prints on stdout, as a fenced block."""
    words = shlex.split(command)
    environment = {
        **os.environ,
        "COLUMNS": WIDTH,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 2):
        raise SystemExit(f"{command}: exit {result.returncode}\n{result.stderr}")
    # A refusal is told on stderr; progress, which is there too, is not shown.
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    lines = [line.rstrip() for line in (*result.stdout.splitlines(), *errors)]
    return "```text\n$ " + command + "\n" + "\n".join(lines) + "\n```\n"


def with_results(text: str) -> str:
    """Return ``text`` with the rows of ``benchmarks/RESULTS.md`` in its blocks of results."""
    return RESULTS_BLOCK.sub(lambda m: m[1] + _rows(m["names"].split(", ")) + m[3], text)


def _rows(names: list[str]) -> str:
    """Return some columns of the rows of these models, from the first table that has them."""
    lines = [_cells(line) for line in RESULTS.read_text().splitlines() if line.startswith("| ")]
    # The first table that has a row is the one of counts.
    rows = {cells[0]: cells for cells in reversed(lines)}
    places = [rows["model"].index(column) for column in COLUMNS]
    picked = [[rows[f"`{name}`"][place] for place in places] for name in names]
    table = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *picked]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def main() -> None:
    """Rewrite every block of the README."""
    (ROOT / "demo").mkdir(exist_ok=True)
    text = with_results(README.read_text())
    README.write_text(BLOCK.sub(lambda m: m[1] + shown(m["command"]) + m[3], text))


if __name__ == "__main__":
    main()
