"""The times of ``bench`` as one SVG drawing, for a document or a pull request."""

from __future__ import annotations

from html import escape

from repconv_cli.report.bench import name_of, sentence
from repconv_cli.report.words import plain
from repconv_cli.results import Result

_WIDTH, _LEFT, _BARS = 820, 190, 420
_ROW, _BAR, _TOP = 58, 16, 64
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.note { fill: #59636e }
.original { fill: #8c959f }
.fused { fill: #0969da }
svg { background: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .note { fill: #9198a1 } .original { fill: #656c76 } .fused { fill: #4493f8 }
  svg { background: #0d1117 }
}
"""


def speed_plot(result: Result) -> str:
    """Return the median time of one call in each runtime, original and fused, as bars of one scale.

    A runtime that could not be timed is told with the reason.
    """
    assert result.bench is not None, "bench alone has times"
    runtimes = result.bench.runtimes
    longest = max((max(r.original_ms or 0.0, r.fused_ms or 0.0) for r in runtimes), default=0.0) or 1.0
    height = _TOP + _ROW * len(runtimes)
    conclusion = plain(sentence(result.bench).plain)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(conclusion)}">',
        f"<style>{_STYLE}</style>",
        _text(16, 26, "Time of one call, median: original above, fused below", "title"),
        _text(16, 48, "shorter is faster; the speed-up with its 95 % interval", "note"),
    ]
    for index, runtime in enumerate(runtimes):
        top = _TOP + _ROW * index
        parts.append(_text(16, top + 26, plain(name_of(runtime))))
        if runtime.original_ms is None or runtime.fused_ms is None or runtime.speedup is None:
            parts.append(_text(_LEFT, top + 26, plain(runtime.problem or "not timed"), "note"))
            continue
        sure = f"{runtime.speedup:.2f}× ({runtime.speedup_low:.2f}–{runtime.speedup_high:.2f})"
        parts += _bar(top + 4, runtime.original_ms, longest, "original", "")
        parts += _bar(top + 4 + _BAR + 4, runtime.fused_ms, longest, "fused", sure)
    return "\n".join([*parts, "</svg>", ""])


def _bar(top: int, milliseconds: float, longest: float, kind: str, note: str) -> list[str]:
    width = round(_BARS * milliseconds / longest, 1)
    label = f"{milliseconds:.2f} ms  {note}".rstrip()
    return [
        f'<rect class="{kind}" x="{_LEFT}" y="{top}" width="{width}" height="{_BAR}" rx="2"/>',
        _text(_LEFT + width + 8, top + _BAR - 3, label),
    ]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</text>'
