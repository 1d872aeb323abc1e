"""Results for a person at a terminal. Every text from a file is shown as text, never as markup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from repconv_cli.report.bench import bench_screen
from repconv_cli.report.contents import contents_parts
from repconv_cli.report.folding import Row, fold_rows
from repconv_cli.report.words import plain, size_of
from repconv_cli.results import Change, InputFacts, Result, Verification

_SUMMARY = {
    "convs": "convolutions",
    "norms": "batch norms",
    "ops": "operations",
    "params": "parameters",
    "macs": "MACs",
}


_WIDEST_NAME = 36


class Report:
    """Renders a :class:`~repconv_cli.results.Result`; ``every`` lists each block on its own."""

    def __init__(self, result: Result, *, every: bool = False) -> None:
        self.result = result
        self.every = every

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the report, the verdict last."""
        del options
        yield from self._head()
        if self.result.bench is not None:
            yield from bench_screen(self.result.bench)
            if self.result.verification is not None and not self.result.verification.passed:
                yield _verdict(self.result, self.result.verification)
            return
        if self.result.contents is not None:
            yield from contents_parts(self.result.contents, every=self.every)
            yield Text(f"Next: repconv inspect {plain(self.result.source.name)} --arch file.py:callable")
            return
        if self.result.command != "verify":
            yield Text(self._sentence())
            if self.result.blocks:
                yield self._table(console)
            yield from self._refusals()
            if self.result.totals is not None:
                yield self._totals()
        yield from self._proof()
        yield from self._end()

    def _head(self) -> Iterator[Text]:
        source = self.result.source
        size = f" · {size_of(source.size_bytes)}" if source.size_bytes is not None else ""
        weights = "weights alone" if self.result.contents is not None else "weights with their architecture"
        kind = {"module": "PyTorch module", "weights": weights, "program": "torch.export program"}
        yield Text.assemble(
            (plain(source.name), "bold"),
            f"   {kind.get(source.kind, 'fused by repconv')} · {source.tensors} tensors · {source.dtype}{size}",
        )
        if self.result.input.examples:
            yield Text(f"input     {_input(self.result.input)}")
        for note in (*source.notes, *self.result.notes):
            yield Text(f"note      {plain(note)}")

    def _sentence(self) -> str:
        count = len(self.result.blocks)
        totals = self.result.totals
        if not count:
            return "Nothing to fuse: every linear unit is a single operator already."
        verb = "can be fused" if self.result.command == "inspect" else "fused, each proven"
        detail = ""
        if totals is not None:
            detail = f": convolutions {_arrow(totals.convs)}, batch norms {_arrow(totals.norms)}"
        return f"{count} {'block' if count == 1 else 'blocks'} {verb}{detail}."

    def _table(self, console: Console) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        is_wide = console.width >= 100
        rows = fold_rows(self.result.blocks, every=self.every)
        # Names are what a reader searches for, so the branches give way first.
        longest = max(len(row.name) for row in rows)
        table.add_column("block", overflow="fold", min_width=min(longest, _WIDEST_NAME))
        table.add_column("branches", overflow="fold")
        table.add_column("weight", overflow="fold", no_wrap=not is_wide)
        table.add_column("ops", justify="right", no_wrap=True)
        table.add_column("parameters", justify="right", no_wrap=True)
        if is_wide:
            table.add_column("MACs", justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row)[: 6 if is_wide else 5])
        return table

    def _refusals(self) -> Iterator[Text]:
        refusals = self.result.refusals
        if not refusals:
            return
        yield Text(f"Left as they are ({len(refusals)}):")
        if self.every:
            for refusal in refusals:
                yield Text(f"  {plain(refusal.name)}: {plain(refusal.reason)}")
            return
        first: dict[str, str] = {}
        for refusal in refusals:
            first.setdefault(refusal.reason, refusal.name)
        counts = Counter(refusal.reason for refusal in refusals)
        for reason, count in counts.most_common(8):
            more = f" and {count - 1} more" if count > 1 else ""
            yield Text(f"  {plain(first[reason])}{more}: {plain(reason)}")
        if len(counts) > 8:
            yield Text(f"  … and {len(counts) - 8} other reasons; --all lists each")

    def _totals(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("", "before", "after", "change"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for name, label in _SUMMARY.items():
            change: Change = getattr(self.result.totals, name)
            table.add_row(label, _number(change.before), _number(change.after), _percent(change))
        if self.result.output is not None and self.result.source.size_bytes is not None:
            size = Change(self.result.source.size_bytes, self.result.output.size_bytes)
            table.add_row("file", size_of(size.before), size_of(size.after), _percent(size))
        return table

    def _proof(self) -> Iterator[Text]:
        proofs = [block.certificate for block in self.result.blocks if block.certificate is not None]
        if proofs:
            worst = max(proof["error"] for proof in proofs)
            yield Text(
                f"Proof     {len(proofs)} of {len(proofs)} blocks equal in float64; worst {worst:.1e} of its scale "
                f"(limit {proofs[0]['limit']:.0e})"
            )
        verification = self.result.verification
        if verification is None or verification.max_abs is None:
            return
        yield Text(f"Outputs   {_outputs(verification)}")
        if verification.tensors_checked:
            yield Text(f"Tensors   {verification.tensors_checked} compared with a new plan from the source")

    def _end(self) -> Iterator[Text]:
        result, verification = self.result, self.result.verification
        if result.output is not None and result.command == "fuse":
            verb = "Would write" if result.output.is_dry_run else "Wrote"
            yield Text(f"{verb:<9} {plain(result.output.path)}   sha256 {result.output.sha256[:16]}…")
        if result.output is None and result.command == "fuse":
            yield Text("Nothing was written.")
        for missing in verification.not_checked if verification is not None else ():
            yield Text(f"Not checked: {plain(missing)}")
        if verification is not None:
            yield _verdict(result, verification)
        if result.command == "inspect" and result.blocks:
            yield Text(f"Next: repconv fuse {plain(result.source.name)} OUT.safetensors   (and the same options)")


def _verdict(result: Result, verification: Verification) -> Text:
    name = plain(result.source.name)
    if verification.passed and result.command == "fuse" and result.output is None:
        return Text.assemble(
            ("REFUSED", "bold yellow"), "  --strict: see what was left or not checked above; the outputs agree."
        )
    if verification.verdict == "pass":
        return Text.assemble(("PASS", "bold green"), f"  the fused file computes what {name} computes.")
    if verification.verdict == "partial":
        return Text.assemble(("PARTIAL", "bold yellow"), f"  nothing differs from {name}, but not all was checked.")
    where = f" First block that is off: {plain(verification.first_bad_block)}." if verification.first_bad_block else ""
    looks = f" Looks like: {plain(verification.looks_like)}." if verification.looks_like else ""
    return Text.assemble(("FAIL", "bold red"), f"  the outputs are not those of {name}.{where}{looks}")


def _outputs(verification: Verification) -> str:
    ratio = verification.ratio or 0.0
    text = f"largest difference {verification.max_abs:.1e}, {ratio:.2g}× the original's own rounding noise"
    if verification.close is not None:
        text += f"; {verification.close:.1%} isclose"
    if verification.top1 is not None:
        text += f"; top-1 agreement {verification.top1:.1%}"
    return text


def _cells(row: Row) -> tuple[str, ...]:
    first = row.blocks[0]
    name = f"{row.name}  ×{row.count}" if row.count > 1 else row.name
    shape = "×".join(map(str, first.weight_shape)) or "–"
    return (
        escape(plain(name)),
        escape(plain(first.kind)),
        shape,
        _arrow(first.ops),
        _arrow(Change(_sum(row, "params", "before"), _sum(row, "params", "after"))),
        _arrow(Change(_sum(row, "macs", "before"), _sum(row, "macs", "after"))),
    )


def _sum(row: Row, name: str, side: str) -> int:
    return sum(getattr(getattr(block, name), side) or 0 for block in row.blocks)


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _arrow(change: Change) -> str:
    return f"{_number(change.before)} → {_number(change.after)}"


def _percent(change: Change) -> str:
    if not change.before or change.after is None:
        return ""
    if change.before == change.after:
        return "0 %"
    return f"{100 * (change.after - change.before) / change.before:+.1f} %".replace("-", "−")


def _input(facts: InputFacts) -> str:
    shapes = ["×".join(map(str, example)) for example in facts.examples]
    free = any(size is None for shape in facts.shapes for size in shape)
    notes = []
    if facts.is_guessed:
        notes.append("guessed; set it with --input")
    if free:
        axes = [_axis_name(i, len(shape)) for shape in facts.shapes for i, size in enumerate(shape) if size is None]
        notes.append(f"free: {', '.join(dict.fromkeys(axes))}")
    return ", ".join(shapes) + (f"   ({'; '.join(notes)})" if notes else "")


def _axis_name(index: int, ndim: int) -> str:
    if index == 0:
        return "batch"
    names = {4: ("", "", "height", "width"), 5: ("", "", "depth", "height", "width"), 3: ("", "length", "length")}
    return names.get(ndim, ("",) * ndim)[index] or f"axis {index}"
