"""Damage each sample a thousand times and fuse what is left: ``python benchmarks/mutations.py --count 1000``.

Each damaged file goes to a forked child, with ten seconds of work for each command, and its memory measured. A file
must be refused in one line, or read as if it were whole, or fused and verified; everything else is printed with its
seed, kept in ``benchmarks/.records``, and the exit code is 1. The same seeds give the same files, but of those that
torch writes by their old format: they hold addresses of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.hostile.damaged import Victim, judge_damaged, victims
from tests.hostile.judge import MOST_SECONDS, PeakMemory
from tests.hostile.mutations import mutated


@dataclass
class Row:
    """Figures of one sample."""

    name: str
    fates: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    megabytes: float = 0.0

    def line(self) -> str:
        """Return the row as it is printed."""
        fates = " | ".join(str(self.fates[fate]) for fate in ("refused", "whole", "fused"))
        total = self.fates.total() + len(self.wrong)
        return f"| `{self.name}` | {total} | {fates} | {len(self.wrong)} | {self.seconds:.1f} | {self.megabytes:.0f} |"


KEPT = Path(__file__).resolve().parent / ".records"
HEADER = """\
| file | damaged | refused | read as whole | fused, verified | wrong | most s of work | most MB |
|---|--:|--:|--:|--:|--:|--:|--:|"""


def run_in_child(victim: Victim, seed: int, folder: Path, row: Row) -> None:
    """Judge one damaged file in a child and add what came of it to ``row``."""
    kind, content = mutated(victim.name, victim.content, seed)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _judge_and_exit(victim, content, folder, report)
    _, status = os.waitpid(child, 0)
    if status:
        name = "too slow" if os.WTERMSIG(status) == signal.SIGXCPU else f"status {status}"
        found = {"wrong": [f"the child was killed ({name})"], "output": "", "megabytes": 0.0, "seconds": 0.0}
    else:
        found = json.loads(report.read_text())
    row.seconds = max(row.seconds, found["seconds"])
    row.megabytes = max(row.megabytes, found["megabytes"])
    wrong = found["wrong"]
    if wrong:
        row.wrong.append(f"{victim.name} seed {seed} ({kind}): {', '.join(wrong)}\n{found['output'][-500:]}")
        print(row.wrong[-1], flush=True)
        KEPT.mkdir(exist_ok=True)
        (KEPT / f"{seed}-{victim.name}").write_bytes(content)
    else:
        row.fates[found["fate"]] += 1


def _judge_and_exit(victim: Victim, content: bytes, folder: Path, report: Path) -> None:
    # Each command has its own timer, which a loop outside of Python does not hear.
    resource.setrlimit(resource.RLIMIT_CPU, (3 * MOST_SECONDS, 4 * MOST_SECONDS))
    code, peak = 1, PeakMemory()
    try:
        found = judge_damaged(victim, content, folder)
        fate = "refused" if found.is_refused else "fused" if found.output else "whole"
        text = {"fate": fate, "wrong": found.wrong, "output": found.output, "megabytes": peak.megabytes()}
        text["seconds"] = time.process_time()
        report.write_text(json.dumps(text))
        code = 0
    finally:
        os._exit(code)


def main() -> int:
    """Run the table; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="damaged files for each sample")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="samples whose name holds this text")
    arguments = parser.parse_args()
    # A child of a process with threads would wait for threads that it does not have.
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for victim in victims(folder):
            if arguments.only not in victim.name:
                continue
            assert not judge_damaged(Victim(victim.name, b"", victim.options), victim.content, folder).wrong
            rows.append(Row(victim.name))
            for seed in range(arguments.seed, arguments.seed + arguments.count):
                run_in_child(victim, seed, folder, rows[-1])
            print(rows[-1].line(), file=sys.stderr, flush=True)
    print("\n".join([HEADER, *(row.line() for row in rows)]))
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
