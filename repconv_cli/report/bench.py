"""The gains of ``bench`` at a terminal: one line a runtime, and what they come to in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from repconv_cli.quantities import size_of
from repconv_cli.report.words import plain
from repconv_cli.results import BenchFacts, RuntimeFacts

_GAINS = {"gain": ("faster", "green"), "none": ("no gain", "yellow"), "loss": ("slower", "red")}


def bench_screen(facts: BenchFacts) -> Iterator[Table | Text]:
    """Yield the table of times, what went wrong, and the sentence."""
    threads = "1 thread" if facts.threads == 1 else f"{facts.threads} threads"
    shapes = ", ".join("×".join(map(str, shape)) for shape in facts.shapes)
    yield Text(f"Timed     {shapes} · {threads} · {plain(facts.processor)}")
    timed = [runtime for runtime in facts.runtimes if runtime.problem is None]
    if timed:
        yield _table(timed)
    for runtime in facts.runtimes:
        if runtime.problem is not None:
            yield Text(f"{runtime.runtime} cannot run it: {plain(runtime.problem)}")
    yield sentence(facts)


def _table(runtimes: list[RuntimeFacts]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("runtime", min_width=max(len(word) for runtime in runtimes for word in name_of(runtime).split()))
    for name in ("original", "fused", "speed-up\n95 % sure", "peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for runtime in runtimes:
        word, colour = _GAINS[runtime.gain or "none"]
        table.add_row(
            name_of(runtime),
            time_of(runtime.original_ms, runtime.original_spread_ms),
            time_of(runtime.fused_ms, runtime.fused_spread_ms),
            # Two lines: in one, the table would not fit 80 columns.
            Text.assemble(
                (f"{runtime.speedup:.2f}× {word}", colour),
                f"\n{runtime.speedup_low:.2f}–{runtime.speedup_high:.2f}",
            ),
            peaks(runtime),
        )
    return table


def name_of(runtime: RuntimeFacts) -> str:
    """Return ``torch 2.14.1 eager``, ``onnxruntime 1.32.0``."""
    return runtime.version if runtime.version.startswith(runtime.runtime) else f"{runtime.version} {runtime.runtime}"


def time_of(median: float | None, spread: float | None) -> str:
    """Return the median, and half of the distance of the quartiles.

    >>> time_of(12.314, 0.4), time_of(231.2, 25.0), time_of(0.07, None)
    ('12.31 ±0.20 ms', '231 ±12 ms', '0.07 ms')
    """
    if median is None:
        return "–"
    decimals = 2 if median < 100 else 0
    return f"{median:.{decimals}f}" + ("" if spread is None else f" ±{spread / 2:.{decimals}f}") + " ms"


def peaks(runtime: RuntimeFacts) -> str:
    """Return by how much memory grows during one call, before and after."""
    if runtime.original_peak_bytes is None or runtime.fused_peak_bytes is None:
        return "–"
    before, after = size_of(runtime.original_peak_bytes), size_of(runtime.fused_peak_bytes)
    unit = before.rpartition(" ")[2]
    # One unit is enough, and leaves room for the rest.
    return f"{before.removesuffix(f' {unit}')} → {after}" if after.endswith(f" {unit}") else f"{before} → {after}"


def sentence(facts: BenchFacts) -> Text:
    """Return what the gains come to."""
    timed = [runtime for runtime in facts.runtimes if runtime.problem is None]
    if not timed:
        return Text.assemble(("NOT TIMED", "bold red"), "  no runtime could run both models.")
    told = [
        f"no gain in {runtime.runtime}"
        if runtime.gain == "none"
        else f"{runtime.speedup:.2f}× as fast in {runtime.runtime}"
        for runtime in timed
    ]
    if any(runtime.gain == "gain" for runtime in timed):
        return Text.assemble(("GAIN", "bold green"), f"  the fused model: {'; '.join(told)}.")
    return Text.assemble(("NO GAIN", "bold yellow"), f"  the fused model: {'; '.join(told)}.")
