"""Results for a person at a terminal. Every text from a file is shown as text, never as markup."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from repconv_cli.quantities import size_of
from repconv_cli.report import sentences
from repconv_cli.report.advice import NOTHING, advice_on
from repconv_cli.report.bench import bench_screen
from repconv_cli.report.contents import contents_parts, grouped
from repconv_cli.report.tables import blocks_table, checks_table, totals_table
from repconv_cli.report.words import command, inputs, lines, plain
from repconv_cli.results import BlockFacts, Result, Verification

__all__ = ["Report", "plain"]

_LABEL = 10
_MOST_REASONS = 8
_COLOURS = {"PASS": "bold green", "PARTIAL": "bold yellow", "REFUSED": "bold yellow", "FAIL": "bold red"}


class Report:
    """Renders a :class:`~repconv_cli.results.Result`.

    ``every`` lists each block on its own, ``details`` adds the keys and the proof of each, every sample and the time;
    ``options`` are those that the next command needs as well, ``page`` is where the HTML report lies.
    """

    def __init__(
        self,
        result: Result,
        *,
        every: bool = False,
        details: bool = False,
        options: tuple[str, ...] = (),
        page: str = "",
    ) -> None:
        self.result = result
        self.every = every
        self.details = details
        self.options = options
        self.page = page
        self.width = 80

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the parts of the report, the verdict or the next command last."""
        del options
        self.width = console.width
        yield from self._head()
        if self.result.bench is not None:
            yield from bench_screen(self.result.bench)
            if self.result.verification is not None and not self.result.verification.passed:
                yield self._verdict(self.result.verification)
            return
        if self.result.contents is not None and not self.result.blocks:
            yield Text()
            yield from contents_parts(self.result.contents, self.width, every=self.every)
            if sentences.is_unknown(self.result):
                yield Text()
                yield self._next("repconv", "inspect", self.result.source.name, "--arch", "file.py:callable")
            return
        if self.result.command != "verify":
            if self.result.blocks:
                yield Text()
                yield blocks_table(self.result.blocks, self.width, every=self.every)
            if self.details:
                yield from self._each_block()
            yield from self._refusals()
            if self.result.totals is not None:
                yield Text()
                yield totals_table(self.result, self.result.totals)
            if self.result.blocks or self.result.command == "fuse":
                yield Text()
        yield from self._proof()
        if self.details:
            seconds = ", ".join(f"{plain(name)} {spent:.1f} s" for name, spent in self.result.seconds.items())
            yield self._labelled("Time", seconds)
        yield from self._end()

    def _line(self, text: str, indent: int = 0) -> Text:
        return Text(lines(text, self.width, indent))

    def _labelled(self, label: str, text: str) -> Text:
        return self._line(f"{label:<{_LABEL}}{text}", _LABEL)

    def _head(self) -> Iterator[Text]:
        result = self.result
        name = plain(result.source.name)
        head = self._line(f"{name}   {sentences.what_it_is(result)}", 2)
        head.stylize("bold", 0, len(name))
        yield head
        if result.command in ("inspect", "fuse"):
            yield self._line(sentences.headline(result), 2)
        elif result.command == "verify" and result.output is not None:
            yield self._line(f"{plain(result.output.path)}   {size_of(result.output.size_bytes)}", 2)
        if result.input.examples:
            yield self._labelled("input", inputs(result.input))
        for note in (*result.source.notes, *result.notes):
            yield self._labelled("note", plain(note))

    def _each_block(self) -> Iterator[Text]:
        for block in self.result.blocks:
            yield self._line(f"  {plain(block.name)} → {_fate(block)}", 4)
            yield self._line(f"    from {', '.join(grouped(block.sources))}", 9)

    def _refusals(self) -> Iterator[Text]:
        refusals = self.result.refusals
        if not refusals:
            return
        yield Text()
        yield Text(f"Left as they are ({len(refusals)}):")
        if self.every:
            for refusal in refusals:
                yield self._line(f"  {plain(refusal.name)}: {plain(refusal.reason)}", 4)
            return
        kept = sentences.left(self.result)
        for names, reason in kept[:_MOST_REASONS]:
            advice = advice_on(reason) or NOTHING
            told = "" if advice.startswith(NOTHING) else f". {advice[0].upper()}{advice[1:]}."
            yield self._line(f"  {names}: {reason}{told}", 4)
        if len(kept) > _MOST_REASONS:
            yield self._line(f"  … and {len(kept) - _MOST_REASONS} other reasons; --all lists each", 4)

    def _proof(self) -> Iterator[RenderableType]:
        result, verification = self.result, self.result.verification
        proof = sentences.proof(result)
        if proof is not None:
            yield self._labelled("Proof", proof)
        if verification is None:
            return
        if result.command == "verify" or self.details:
            yield Text()
            yield checks_table(verification)
            if verification.noise is not None:
                text = "Rounding noise is how far the original itself is from its own run in float64."
                yield self._line(text)
            yield Text()
        elif verification.max_abs is not None:
            yield self._labelled("Outputs", sentences.outputs(verification))

    def _end(self) -> Iterator[Text]:
        result, verification = self.result, self.result.verification
        if result.command == "fuse":
            yield self._line(sentences.written(result), _LABEL)
        if self.page:
            yield self._labelled("Report", plain(self.page))
        if verification is not None:
            for assumption in verification.assumptions:
                yield self._labelled("Assumed", plain(assumption))
            for missing in verification.not_checked:
                yield self._labelled("Unchecked", plain(missing))
            if verification.largest_error is not None:
                yield self._labelled("Worst", sentences.place_of(verification.largest_error))
            yield self._verdict(verification)
        if result.command == "inspect" and result.blocks:
            yield self._next("repconv", "fuse", result.source.name, sentences.name_for_output(result), *self.options)
        if result.command == "fuse" and result.output is not None and not result.output.is_dry_run:
            yield self._next("repconv", "verify", result.source.name, result.output.path, *self.options)

    def _verdict(self, verification: Verification) -> Text:
        word, meaning = sentences.verdict(self.result, verification)
        text = self._line(f"{word}  {meaning}", len(word) + 2)
        text.stylize(_COLOURS[word], 0, len(word))
        return text

    def _next(self, *words: str) -> Text:
        return Text(command(words, self.width, "Next: "))


def _fate(block: BlockFacts) -> str:
    target = plain(block.target) if block.target else "no tensor"
    if block.certificate is None:
        return target
    return f"{target}   error {block.certificate['error']:.1e} of {block.certificate['limit']:.0e}"
