"""Records as markdown: the tables of ``RESULTS.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.record import Counts, Latency, Record, Spread

Cell = Callable[[Record], str]
NOTHING = "–"


def render(records: Sequence[Record], header: str) -> str:
    """Return the whole page: ``header``, a summary, the tables, and what could not be measured."""
    parts = [
        header,
        "## In short\n",
        _summary(records),
        "## Convolutions, norms and operations\n",
        _COUNTS_TEXT,
        _table(records, _COUNTS),
        "## Exactness\n",
        _EXACTNESS_TEXT,
        _table(records, _EXACTNESS),
        "## Time and memory of the conversion\n",
        _TIME_TEXT,
        _table(records, _TIME),
    ]
    timed = [record for record in records if record.eager or record.onnx]
    if timed:
        parts += ["## Latency\n", _LATENCY_TEXT, _table(timed, _LATENCY)]
    notes = [f"- `{record.name}`: {note}" for record in records for note in record.notes]
    if notes:
        parts += ["## Traced with fixed sizes\n", "\n".join(notes) + "\n"]
    problems = [f"- `{record.name}`: {problem}" for record in records for problem in record.problems]
    if problems:
        parts += ["## Not measured, and why\n", "\n".join(problems) + "\n"]
    return "\n".join(parts)


def _table(records: Iterable[Record], columns: dict[str, Cell]) -> str:
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if index == 0 else "---:" for index in range(len(columns))) + "|",
    ]
    lines += ["| " + " | ".join(cell(record) for cell in columns.values()) + " |" for record in records]
    return "\n".join(lines) + "\n"


def _summary(records: Sequence[Record]) -> str:
    done = [record for record in records if record.after is not None]
    rivals = [record for record in done if record.own is not None]
    by_hand = [record for record in done if record.convs_by_hand is not None]
    lines = [
        f"- {len(done)} of {len(records)} models were fused and proven.",
        f"- {sum(not _is_above(record) for record in rivals)} of {len(rivals)} have at most as many convolutions, norms"
        f" and operations as their library's own converter leaves; {sum(map(_is_below, rivals))} have fewer of some.",
        f"- {sum(_convs(r) <= (r.convs_by_hand or 0) for r in by_hand)} of {len(by_hand)} have at most the convolutions"
        " that a merge by hand leaves.",
        f"- In {sum(map(_is_in_time, done))} of {len(done)}, what repconv does itself, up to the certificates, takes"
        " at most as long as `torch.export`.",
        f"- In {sum(map(_is_in_memory, done))} of {len(done)}, it needs at most twice the memory of the weights.",
    ]
    lines += [f"- Above its own converter: `{r.name}` ({_compared(r)})." for r in rivals if _is_above(r)]
    lines += [
        f"- Above the figure by hand: `{r.name}` ({_convs(r)} for {r.convs_by_hand})."
        for r in by_hand
        if _convs(r) > (r.convs_by_hand or 0)
    ]
    return "\n".join(lines) + "\n"


def _counted(counts: Counts | None) -> tuple[int, int, int]:
    return (counts.convs, counts.norms, counts.ops) if counts else (0, 0, 0)


def _is_above(record: Record) -> bool:
    return any(ours > own for ours, own in zip(_counted(record.after), _counted(record.own), strict=True))


def _is_below(record: Record) -> bool:
    return any(ours < own for ours, own in zip(_counted(record.after), _counted(record.own), strict=True))


def _compared(record: Record) -> str:
    pairs = zip(("convs", "norms", "ops"), _counted(record.after), _counted(record.own), strict=True)
    return ", ".join(f"{ours} {what} for {own}" for what, ours, own in pairs if ours > own)


def _convs(record: Record) -> int:
    return record.after.convs if record.after else 0


def _is_in_time(record: Record) -> bool:
    return (record.fuse_seconds or 0) <= (record.export_seconds or 0)


def _is_in_memory(record: Record) -> bool:
    return (record.peak_bytes or 0) <= 2 * (record.weight_bytes or 0)


def _name(record: Record) -> str:
    return f"`{record.name}`"


def _arrow(pick: Callable[[Counts], float], show: Callable[[float], str]) -> Cell:
    """Return a cell ``before → after → own``."""

    def cell(record: Record) -> str:
        forms = (record.before, record.after, record.own)
        return " → ".join(show(pick(form)) if form else NOTHING for form in forms)

    return cell


def _whole(number: float) -> str:
    return str(int(number))


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f}" if number < 1e8 else f"{number / 1e6:.0f}"


def _power(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.0e}"


def _seconds(number: float | None) -> str:
    return NOTHING if number is None else f"{number:.1f}"


def _ratio(spread: Spread | None) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})" if spread else NOTHING


def _latency(pick: Callable[[Record], Latency | None], form: Callable[[Latency], Spread | None]) -> Cell:
    def cell(record: Record) -> str:
        found = pick(record)
        return _ratio(form(found)) if found else NOTHING

    return cell


def _milliseconds(pick: Callable[[Record], Latency | None]) -> Cell:
    def cell(record: Record) -> str:
        found = pick(record)
        return f"{found.milliseconds:.1f}" if found else NOTHING

    return cell


def _peak(record: Record) -> str:
    if record.peak_bytes is None or not record.weight_bytes:
        return NOTHING
    return f"{record.peak_bytes / record.weight_bytes:.1f}× ({record.peak_bytes / 2**20:.0f} MiB)"


_COUNTS_TEXT = """\
Each figure is before → after repconv → after the library's own converter. *By hand*: the convolutions that a merge by
hand leaves, for models whose library has no converter. Operations are those of the traced graph, without arithmetic
on sizes; multiply-accumulates are counted by `torch.utils.flop_counter` for all three alike, per sample.
"""
_COUNTS: dict[str, Cell] = {
    "model": _name,
    "own converter": lambda record: record.own_name or NOTHING,
    "convs": _arrow(lambda counts: counts.convs, _whole),
    "by hand": lambda record: str(record.convs_by_hand or NOTHING),
    "norms": _arrow(lambda counts: counts.norms, _whole),
    "operations": _arrow(lambda counts: counts.ops, _whole),
    "parameters, M": _arrow(lambda counts: counts.params, _millions),
    "MACs, M": _arrow(lambda counts: counts.macs, _millions),
}

_EXACTNESS_TEXT = """\
*Certificate*: the worst of all blocks, float64, relative to `sum |w||x| + |b|` of each value (limit 1e-12). The other
two: the largest difference of any output, relative to that output's range, of the whole model in float64 before the
last cast (limit 1e-11), and in float32 after it. In float32, models that pick their top k are judged by what comes
before.
"""
_EXACTNESS: dict[str, Cell] = {
    "model": _name,
    "blocks": lambda record: NOTHING if record.blocks is None else str(record.blocks),
    "certificate": lambda record: _power(record.certificate),
    "float64": lambda record: _power(record.float64_difference),
    "float32": lambda record: _power(record.float32_difference),
}

_TIME_TEXT = """\
Seconds. *torch.export*: a plain export at fixed sizes, the yardstick. *trace*: what repconv asks of torch, with sizes
free and in-place operators removed. Of repconv itself: *plan* (analysis and selection, no kernel computed); *fuse*
(plan, kernels, certificates, rewrite); *with proof* (all that, and original and fused model in float64). *Memory*: peak
resident memory of the latter above that of the loaded and traced model, in multiples of the weights.
"""
_TIME: dict[str, Cell] = {
    "model": _name,
    "torch.export": lambda record: _seconds(record.export_seconds),
    "trace": lambda record: _seconds(record.trace_seconds),
    "plan": lambda record: _seconds(record.plan_seconds),
    "fuse": lambda record: _seconds(record.fuse_seconds),
    "with proof": lambda record: _seconds(record.all_seconds),
    "memory": _peak,
}

_LATENCY_TEXT = """\
How many times as long as repconv's model the original takes, and the one that the library's own converter made: above
1, repconv's is faster. One sample, one thread, interleaved rounds in one process; the median of the rounds' ratios,
with 95 % intervals. *ms*: repconv's own model, on the machine named above, for scale only.
"""
_LATENCY: dict[str, Cell] = {
    "model": _name,
    "torch eager: original": _latency(lambda record: record.eager, lambda latency: latency.original),
    "torch eager: own": _latency(lambda record: record.eager, lambda latency: latency.own),
    "torch, ms": _milliseconds(lambda record: record.eager),
    "onnxruntime: original": _latency(lambda record: record.onnx, lambda latency: latency.original),
    "onnxruntime: own": _latency(lambda record: record.onnx, lambda latency: latency.own),
    "onnxruntime, ms": _milliseconds(lambda record: record.onnx),
}
