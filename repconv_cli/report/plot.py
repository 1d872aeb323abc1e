"""The times of ``bench`` as one SVG drawing, for a document or a pull request."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement, tostring

from repconv_cli.report.bench import sentence
from repconv_cli.report.page_charts import speeds
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
    scale = _BARS / (max((max(r.original_ms or 0.0, r.fused_ms or 0.0) for r in runtimes), default=0.0) or 1.0)
    width, height = str(_WIDTH), str(_TOP + _ROW * len(runtimes))
    drawing = Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "width": width, "height": height,
         "role": "img", "aria-label": plain(sentence(result.bench).plain)},
    )  # fmt: skip
    SubElement(drawing, "style").text = _STYLE
    _write(
        drawing,
        16,
        26,
        "Time of one call, median and half of its quartiles' distance: original above, fused below",
        "title",
    )
    _write(drawing, 16, 48, "shorter is faster; the speed-up with its 95 % interval", "note")
    for index, (runtime, row) in enumerate(zip(runtimes, speeds(result), strict=True)):
        top = _TOP + _ROW * index
        _write(drawing, 16, top + 26, row["name"])
        if runtime.original_ms is None or runtime.fused_ms is None or "speedup" not in row:
            _write(drawing, _LEFT, top + 26, row["problem"] or "not timed", "note")
            continue
        gain = f"{row['after']}  {row['speedup']} ({row['sure']})"
        _bar(drawing, top + 4, scale * runtime.original_ms, row["before"], "original")
        _bar(drawing, top + 4 + _BAR + 4, scale * runtime.fused_ms, gain, "fused")
    return tostring(drawing, encoding="unicode") + "\n"


def _bar(drawing: Element, top: int, width: float, label: str, kind: str) -> None:
    place = {"x": str(_LEFT), "y": str(top), "width": f"{width:.1f}", "height": str(_BAR), "rx": "2"}
    SubElement(drawing, "rect", {"class": kind, **place})
    _write(drawing, _LEFT + round(width, 1) + 8, top + _BAR - 3, label)


def _write(drawing: Element, x: float, y: float, text: str, kind: str = "label") -> None:
    SubElement(drawing, "text", {"class": kind, "x": str(x), "y": str(y)}).text = text
