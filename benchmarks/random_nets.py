"""Fuse random nets and compare each with its module in float64: ``python benchmarks/random_nets.py --count 10000``.

Exits 1 if any net gives other outputs or raises; each failure is printed with its seed and shrunk to a net that can
be kept as a test. The same seeds give the same nets.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.graph.nets.checking import Outcome, check, is_valid, shrunk, with_valid_sizes
from tests.graph.nets.drawing import draw_net
from tests.graph.nets.full import draw_full_net
from tests.graph.nets.language import Net

EXPORT_EVERY = 100


@dataclass
class Summary:
    """Figures over all nets so far."""

    nets: int = 0
    exported: int = 0
    fused: int = 0
    blocks: int = 0
    convs_before: int = 0
    convs_after: int = 0
    certificate: float = 0.0
    difference: float = 0.0
    shapes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one net that came out right."""
        self.fused += outcome.blocks > 0
        self.blocks += outcome.blocks
        self.convs_before += outcome.convs_before
        self.convs_after += outcome.convs_after
        self.shapes += outcome.shapes
        self.certificate = max(self.certificate, outcome.certificate)
        self.difference = max(self.difference, outcome.difference)
        self.reasons.update(_kind_of(reason) for reason in outcome.refusals)

    def line(self) -> str:
        """Return the progress in one line."""
        return (
            f"{self.nets} nets, {self.blocks} blocks, convs {self.convs_before} → {self.convs_after}, "
            f"worst certificate {self.certificate:.1e}, worst difference {self.difference:.1e}, "
            f"{self.failures.total()} failures"
        )


def _kind_of(reason: str) -> str:
    """Return a reason without its figures, so that equal ones count together."""
    return "".join("#" if c.isdigit() else c for c in reason.partition(" (")[0]).replace("##", "#")


def failure(net: Net, *, is_exported: bool) -> str | None:
    """Return how ``net`` fails (the exception's type and first line), None if it comes out right."""
    try:
        check(net, is_exported=is_exported)
    except Exception as error:  # noqa: BLE001 - any exception is a failure, that is the test
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def run(count: int, seed: int, *, is_full: bool = False, export_every: int = EXPORT_EVERY, shrink: int = 20) -> Summary:
    """Return the figures of ``count`` nets from ``seed`` on, printing progress and failures."""
    draw = draw_full_net if is_full else draw_net
    summary, start = Summary(), time.perf_counter()
    for number in range(seed, seed + count):
        net = with_valid_sizes(draw(random.Random(number), number))
        is_exported = number % export_every == 0
        summary.nets += 1
        summary.exported += is_exported
        try:
            summary.add(check(net, is_exported=is_exported))
        except Exception as error:  # noqa: BLE001 - any exception is a failure, that is the test
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            summary.failures[type(error).__name__] += 1
            print(f"seed {number}{' (exported)' if is_exported else ''}: {message}", flush=True)
            if summary.failures.total() <= shrink and not is_exported:
                _print_shrunk(net, type(error).__name__)
        if summary.nets % 500 == 0:
            print(f"{time.perf_counter() - start:6.0f} s  {summary.line()}", file=sys.stderr, flush=True)
    return summary


def _print_shrunk(net: Net, name: str) -> None:
    """Print the smallest net that fails with the same exception."""

    def fails(smaller: Net) -> bool:
        found = failure(smaller, is_exported=False) if is_valid(smaller) else None
        return found is not None and found.startswith(name)

    smallest = shrunk(net, fails)
    print(smallest, failure(smallest, is_exported=False), sep="\n", flush=True)


def main() -> int:
    """Run as many nets as asked, print the summary, return 1 on any failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-every", type=int, default=EXPORT_EVERY, help="go through torch.export every N nets")
    parser.add_argument("--full", action="store_true", help="nets with layers over all values of a sample")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    summary = run(options.count, options.seed, is_full=options.full, export_every=options.export_every)
    print(f"{summary.line()}\n{summary.fused} nets with a block, {summary.exported} through torch.export,")
    print(f"compared at {summary.shapes} shapes in {time.perf_counter() - start:.0f} s. Refusals:")
    for reason, number in summary.reasons.most_common():
        print(f"{number:8,}  {reason}")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
