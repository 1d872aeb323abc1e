"""What the page's template shows, in words and figures ready to print."""

from __future__ import annotations

import math
from typing import Any

from repconv_cli.quantities import size_of
from repconv_cli.report import sentences
from repconv_cli.report.advice import advice_on
from repconv_cli.report.bench import sentence
from repconv_cli.report.contents import folded
from repconv_cli.report.page_charts import gains, histogram, speeds
from repconv_cli.report.page_data import INT8_LIMIT, blocks_of, is_wide
from repconv_cli.report.page_use import next_step, use_of
from repconv_cli.report.tables import check_rows
from repconv_cli.report.words import arrow, counted, inputs, plain, shape, share_of
from repconv_cli.results import BlockFacts, Picture, Result


def page_facts(result: Result, options: tuple[str, ...], version: str) -> dict[str, Any]:
    """Return the facts that the template names."""
    blocks = blocks_of(result)
    verification, drawing = result.verification, result.drawing
    proof = sentences.proof(result)
    pictures = drawing.pictures if drawing is not None else ()
    ranges = _ranges(blocks, pictures)
    checks = [] if verification is None else check_rows(verification)
    return {
        "version": version,
        "title": f"repconv {result.command}: {plain(result.source.name)}",
        "what": sentences.what_it_is(result),
        "headline": _headline(result),
        "speeds": speeds(result),
        "contents": [] if result.contents is None else folded(result.contents.tensors, every=False),
        "sections": _sections(result, has_ranges=bool(ranges), has_proof=bool(proof or checks)),
        "gains": gains(result),
        "summary": summary_title(result),
        "input": inputs(result.input) if result.input.examples else "",
        "notes": [plain(note) for note in (*result.source.notes, *result.notes)],
        "sha256": result.source.sha256,
        "seconds": ", ".join(f"{plain(name)} {spent:.1f} s" for name, spent in result.seconds.items()),
        "has_graph": has_graph(result),
        "blocks": [_block(block) for block in blocks],
        "ranges": ranges,
        "warned": _warned(ranges),
        "int8_limit": f"{100 * INT8_LIMIT:.0f} %",
        "proof": proof,
        "histogram": histogram(blocks),
        "checks": checks,
        "refusals": [
            {"name": names, "reason": reason, "advice": advice_on(reason) or ""}
            for names, reason in sentences.left(result, most=8)
        ],
        "has_plan": has_plan(result),
        "has_refusals": has_refusals(result),
        **_ending(result, options),
    }


def summary_title(result: Result) -> str:
    """Return the heading of the first section."""
    return "What changes" if gains(result) else "Summary"


def has_graph(result: Result) -> bool:
    """Whether there is a graph to show."""
    return result.drawing is not None and result.drawing.has_graph


def has_plan(result: Result) -> bool:
    """Whether blocks were looked for."""
    return not sentences.is_unknown(result) and (result.command in ("inspect", "fuse") or result.drawing is not None)


def has_refusals(result: Result) -> bool:
    """Whether what was left is told: weights alone do not show it."""
    return result.contents is None and result.command in ("inspect", "fuse")


def _headline(result: Result) -> str:
    if result.bench is not None:
        return sentence(result.bench).plain
    return sentences.headline(result) if result.command in ("inspect", "fuse") else ""


def _sections(result: Result, *, has_ranges: bool, has_proof: bool) -> list[tuple[str, str]]:
    """Return (anchor, name) of each section that the page has."""
    found = [
        ("summary", summary_title(result), True),
        ("speed", "Speed", result.bench is not None),
        ("graph", "Graph", has_graph(result)),
        ("blocks", f"Blocks ({len(blocks_of(result))})", has_plan(result)),
        ("contents", "Tensors", result.contents is not None),
        ("ranges", "Ranges and int8", has_ranges),
        ("proof", "What was checked", has_proof),
        ("left", f"Left as it is ({len(result.refusals)})", has_refusals(result)),
        ("use", "Use", True),
    ]
    return [(anchor, name) for anchor, name, is_there in found if is_there]


def _ending(result: Result, options: tuple[str, ...]) -> dict[str, Any]:
    """Return the verdict, the output, and what to do with it."""
    verification, output = result.verification, result.output
    found: dict[str, Any] = {"verdict": None, "worst": None, "assumed": (), "not_checked": (), "output": ""}
    if verification is not None:
        word, meaning = sentences.verdict(result, verification)
        found["verdict"] = {"word": word, "meaning": meaning}
        found["assumed"] = [plain(text) for text in verification.assumptions]
        found["not_checked"] = [plain(text) for text in verification.not_checked]
        if verification.largest_error is not None:
            found["worst"] = sentences.place_of(verification.largest_error)
    has_file = output is not None and not output.is_dry_run and (verification is None or verification.passed)
    if output is not None:
        found["output"] = f"{plain(output.path)} · {size_of(output.size_bytes)} · sha256 {output.sha256}"
    if output is not None and has_file:
        found["use"] = use_of(result, output, options)
    else:
        found["use"] = next_step(result, options, is_done=has_plan(result) and not blocks_of(result))
    return {**found, "has_file": has_file}


def _block(block: BlockFacts) -> dict[str, str]:
    return {
        "name": plain(block.name),
        "kind": plain(block.kind),
        "shape": shape(block.weight_shape) or "–",
        "ops": arrow(block.ops),
        "params": arrow(block.params),
        "macs": arrow(block.macs),
        "error": "–" if block.certificate is None else f"{block.certificate['error']:.1e}",
    }


def _ranges(blocks: tuple[BlockFacts, ...], pictures: tuple[Picture, ...]) -> list[dict[str, Any]]:
    """Return a row for each block with a kernel, the worst for int8 first."""
    rows = []
    for index, (block, picture) in enumerate(zip(blocks, pictures, strict=False)):
        after = picture.range_after
        if after is None:
            continue
        before = picture.ranges_before
        largest = max((max(-one.low, one.high) for one in before), default=math.nan)
        rows.append(
            {
                "index": index,
                "name": plain(block.name),
                "largest_before": f"{largest:.3g}",
                "largest_after": f"{max(-after.low, after.high):.3g}",
                "error_before": share_of(max((one.int8_error for one in before), default=math.nan)),
                "error_after": share_of(after.int8_error),
                "by_channel": share_of(after.int8_error_by_channel),
                "is_wide": is_wide(picture),
                "order": after.int8_error,
            }
        )
    return sorted(rows, key=lambda row: -row["order"])


def _warned(ranges: list[dict[str, Any]]) -> str | None:
    wide = [row for row in ranges if row["is_wide"]]
    if not wide:
        return None
    return f"{counted(len(wide), 'block')} of {len(ranges)} would lose accuracy with one int8 scale for the tensor."
