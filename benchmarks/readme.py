"""Write the output blocks of README.md by running the commands that they show: ``make readme``.

A block starts with ``<!-- output: COMMAND -->`` and ends with ``<!-- end -->``; what stands between is replaced.
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


def main() -> None:
    """Rewrite every block of the README."""
    (ROOT / "demo").mkdir(exist_ok=True)
    text = README.read_text()
    README.write_text(BLOCK.sub(lambda m: m[1] + shown(m["command"]) + m[3], text))


if __name__ == "__main__":
    main()
