"""The tables of the terminal: blocks, totals, and what was checked."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from repconv_cli.quantities import size_of
from repconv_cli.report.folding import Row, fold_rows
from repconv_cli.report.words import arrow, compact, lines, number, percent, plain, shape, share_of
from repconv_cli.results import BlockFacts, Change, Result, Totals, Verification

WIDE = 100
"""From this width on there is room for multiply-accumulates beside parameters."""

SUMMARY = {
    "convs": "convolutions",
    "norms": "batch norms",
    "ops": "operations",
    "params": "parameters",
    "macs": "MACs",
}
"""What is counted of a whole model, and what a reader calls it."""

_GAP = 2
_NARROWEST_KIND = 20
_MOST_SAMPLES = 6


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")


def blocks_table(blocks: tuple[BlockFacts, ...], width: int, *, every: bool) -> Table:
    """Return a row for each block, or each run of blocks that are alike."""
    table = _table()
    cells = [_cells(row) for row in fold_rows(blocks, every=every)]
    # Weights alone tell no operations, and a narrow screen has no room for multiply-accumulates.
    has_ops = any(block.ops.before is not None for block in blocks)
    columns = [name for name in cells[0] if has_ops or name not in ("ops", "MACs")]
    columns = columns if width >= WIDE else [name for name in columns if name != "MACs"]
    for name in columns:
        table.add_column(name, justify="left" if name in columns[:3] else "right", no_wrap=True)
    rows = [[row[name] for name in columns] for row in cells]
    widest = [max(map(len, cells)) for cells in zip(*rows, columns, strict=True)]
    # Names and branches share what the figures leave; names are what a reader searches for.
    room = width - 1 - sum(widest[2:]) - _GAP * (len(columns) - 1)
    name_width = max(min(widest[0], room - min(widest[1], _NARROWEST_KIND)), 8)
    kind_width = max(min(widest[1], room - name_width), 8)
    for name, kind, *figures in rows:
        broken = (lines(name, name_width, 1), lines(kind, kind_width))
        table.add_row(*(escape(text) for text in broken), *figures)
    return table


def _cells(row: Row) -> dict[str, str]:
    """Return what a row says, by the heading of its column."""
    first = row.blocks[0]
    return {
        "block": f"{plain(row.name)} ×{row.count}" if row.count > 1 else plain(row.name),
        "branches": plain(first.kind),
        "weight": shape(first.weight_shape) or "–",
        "ops": arrow(first.ops),
        "parameters": compact(_sum(row.blocks, "params")),
        "MACs": compact(_sum(row.blocks, "macs")),
    }


def _sum(blocks: tuple[BlockFacts, ...], name: str) -> Change:
    changes = [getattr(block, name) for block in blocks]
    if any(change.before is None or change.after is None for change in changes):
        return Change(None, None)
    return Change(sum(change.before for change in changes), sum(change.after for change in changes))


def totals_table(result: Result, totals: Totals) -> Table:
    """Return the counts of the whole model, and the sizes of its files."""
    table = _table()
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for name, label in SUMMARY.items():
        change: Change = getattr(totals, name)
        if change != Change(None, None):
            table.add_row(label, number(change.before), number(change.after), percent(change))
    before = result.source.size_bytes
    if result.output is not None and before is not None:
        sizes = Change(before, result.output.size_bytes)
        table.add_row("file", size_of(sizes.before), size_of(sizes.after), percent(sizes))
    return table


def checks_table(verification: Verification) -> Table:
    """Return what was checked of the file's outputs and tensors, and by which yardstick."""
    table = _table()
    for name in ("check", "found", "allowed", "yardstick"):
        table.add_column(name, justify="left" if name in ("check", "yardstick") else "right", no_wrap=True)
    for row in check_rows(verification):
        table.add_row(*row)
    return table


def check_rows(verification: Verification) -> list[tuple[str, str, str, str]]:
    """Return (check, what was found, what is allowed, the yardstick beside it) for each check that was made."""
    rows = []
    if verification.max_abs is not None:
        noise = f"{verification.ratio or 0:.2g}× rounding noise"
        rows.append(("outputs, largest |Δ|", _small(verification.max_abs), _small(verification.limit), noise))
    samples = verification.per_sample
    if len(samples) > 1:
        for index, sample in enumerate(samples[:_MOST_SAMPLES]):
            rows.append((f"  sample {index + 1}", _small(sample["max_abs"]), "", f"noise {_small(sample['noise'])}"))
        if len(samples) > _MOST_SAMPLES:
            rows.append((f"  … {len(samples) - _MOST_SAMPLES} more: --json", "", "", ""))
    if verification.close is not None:
        rows.append(("values that are close", share_of(verification.close), "", "told, not judged"))
    if verification.top1 is not None:
        rows.append(("same largest class", share_of(verification.top1), "", "told, not judged"))
    if verification.tensors_checked:
        verdict = "some differ" if verification.largest_error is not None else "all agree"
        rows.append(("tensors, by a new plan", str(verification.tensors_checked), "", verdict))
    return rows


def _small(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
