"""The page's charts: gains as bars, and how far the proofs are from their limit."""

from __future__ import annotations

import math
from typing import Any

from repconv_cli.quantities import size_of
from repconv_cli.report.bench import name_of, peaks, time_of
from repconv_cli.report.tables import SUMMARY
from repconv_cli.report.words import number, percent, plain
from repconv_cli.results import BlockFacts, Change, Result

_BAR = 260
_FIRST_DECADE, _LAST_DECADE = -18, -10
_STEP, _HEIGHT = 56, 150


def gains(result: Result) -> list[dict[str, Any]]:
    """Return each count of the whole model before and after, and the length of the second bar."""
    rows: list[tuple[str, Change, str, str]] = []
    if result.totals is not None:
        counts = [(label, getattr(result.totals, name)) for name, label in SUMMARY.items()]
        rows = [(label, change, number(change.before), number(change.after)) for label, change in counts]
    if result.output is not None and result.source.size_bytes is not None:
        file = Change(result.source.size_bytes, result.output.size_bytes)
        rows.append(("file", file, size_of(file.before), size_of(file.after)))
    return [
        {"name": name, "before": before, "after": after, "change": percent(change), "width": _width(change)}
        for name, change, before, after in rows
        if change.before is not None and change.after is not None
    ]


def speeds(result: Result) -> list[dict[str, Any]]:
    """Return each runtime's times, and the length of the second bar."""
    if result.bench is None:
        return []
    rows = []
    for runtime in result.bench.runtimes:
        row: dict[str, Any] = {"name": plain(name_of(runtime)), "problem": plain(runtime.problem or "")}
        if runtime.original_ms is not None and runtime.fused_ms is not None and runtime.speedup is not None:
            row |= {
                "before": time_of(runtime.original_ms, runtime.original_spread_ms),
                "after": time_of(runtime.fused_ms, runtime.fused_spread_ms),
                "speedup": f"{runtime.speedup:.2f}×",
                "sure": f"{runtime.speedup_low:.2f}–{runtime.speedup_high:.2f}",
                "memory": peaks(runtime),
                "width": round(min(_BAR / runtime.speedup, _BAR * 2), 1),
            }
        rows.append(row)
    return rows


def _width(change: Change) -> float:
    return round(min(_BAR * (change.after or 0) / (change.before or 1), _BAR * 2), 1)


def histogram(blocks: tuple[BlockFacts, ...]) -> dict[str, Any]:
    """Return the bars of how many blocks have an error of each power of ten, and where the limit is."""
    proofs = [block.certificate for block in blocks if block.certificate is not None]
    decades = range(_FIRST_DECADE, _LAST_DECADE)
    counts = dict.fromkeys(decades, 0)
    for proof in proofs:
        exponent = math.floor(math.log10(proof["error"])) if proof["error"] > 0 else _FIRST_DECADE
        counts[min(max(exponent, _FIRST_DECADE), _LAST_DECADE - 1)] += 1
    limit = proofs[0]["limit"] if proofs else 1e-12
    most, room = max(1, *counts.values()), _HEIGHT - 46
    bars = [
        {
            "x": 24 + index * _STEP,
            "width": _STEP - 6,
            "height": round(room * counts[decade] / most, 1),
            "y": round(_HEIGHT - 22 - room * counts[decade] / most, 1),
            "count": counts[decade],
            "from": f"1e{decade}",
        }
        for index, decade in enumerate(decades)
    ]
    told = ", ".join(f"{count} from 1e{decade}" for decade, count in counts.items() if count)
    return {
        "width": 48 + len(bars) * _STEP,
        "height": _HEIGHT,
        "bars": bars,
        "limit_x": round(24 + (math.log10(limit) - _FIRST_DECADE) * _STEP - 3, 1),
        "label": f"Number of blocks by error: {told}; the limit is {limit:.0e}",
    }
