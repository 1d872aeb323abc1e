"""What the page's script reads: graphs as short lists, blocks with their pictures."""

from __future__ import annotations

import math
from typing import Any

from repconv_cli.report.words import plain, shape, share_of
from repconv_cli.results import BlockFacts, KernelFacts, NodeFacts, Picture, RangeFacts, Result

INT8_LIMIT = 0.05
"""Share of the weights' rms above which int8 rounding with one scale for the tensor is worth a warning."""


def blocks_of(result: Result) -> tuple[BlockFacts, ...]:
    """Return the blocks to show: the result's own, or those of the plan that was drawn."""
    return result.blocks or (result.drawing.blocks if result.drawing is not None else ())


def data_of(result: Result) -> dict[str, Any]:
    """Return the data of the page, JSON-ready."""
    drawing = result.drawing
    blocks = blocks_of(result)
    pictures: tuple[Picture | None, ...] = drawing.pictures if drawing is not None else (None,) * len(blocks)
    graphs = None
    if drawing is not None and drawing.has_graph:
        graphs = {"before": _graph(drawing.before), "after": _graph(drawing.after)}
    return {
        "graphs": graphs,
        "blocks": [_block(block, picture) for block, picture in zip(blocks, pictures, strict=True)],
    }


def _graph(nodes: tuple[NodeFacts, ...]) -> dict[str, Any]:
    modules: dict[str, int] = {}
    rows = [
        [
            plain(node.name),
            plain(node.op),
            modules.setdefault(plain(node.module), len(modules)),
            shape(node.shape),
            shape(node.weight),
            node.inputs,
            -1 if node.block is None else node.block,
        ]
        for node in nodes
    ]
    return {"modules": list(modules), "nodes": rows}


def _block(block: BlockFacts, picture: Picture | None) -> dict[str, Any]:
    proof = block.certificate or {"error": math.nan, "limit": math.nan}
    return {
        "name": plain(block.name),
        "kind": plain(block.kind),
        "branches": [plain(branch) for branch in block.branches],
        "sources": [plain(key) for key in block.sources],
        "target": None if block.target is None else plain(block.target),
        "shape": shape(block.weight_shape),
        **{name: [getattr(block, name).before, getattr(block, name).after] for name in ("ops", "params", "macs")},
        "error": _finite(proof["error"]),
        "limit": _finite(proof["limit"]),
        "picture": None if picture is None else _picture(picture),
        "warning": None if picture is None else warning(picture),
    }


def _picture(picture: Picture) -> dict[str, Any]:
    return {
        "taps": picture.taps,
        "pairs": picture.pairs,
        "branches": [_kernel(kernel) for kernel in picture.branches],
        "fused": None if picture.fused is None else _kernel(picture.fused),
        "before": [_range(one) for one in picture.ranges_before],
        "after": None if picture.range_after is None else _range(picture.range_after),
        "note": plain(picture.note),
    }


def _kernel(kernel: KernelFacts) -> dict[str, Any]:
    return {
        "label": plain(kernel.label),
        "extent": kernel.extent,
        "rms": [_finite(value) for value in kernel.rms],
        "slices": [[_finite(value) for value in taps] for taps in kernel.slices],
    }


def _range(one: RangeFacts) -> dict[str, Any]:
    figures = {"low": one.low, "high": one.high, "rms": one.rms, "error": one.int8_error}
    figures["byChannel"] = one.int8_error_by_channel
    return {"name": plain(one.name), **{name: _finite(value) for name, value in figures.items()}}


def is_wide(picture: Picture) -> bool:
    """Whether int8 with one scale for the tensor would hurt the fused kernel."""
    return picture.range_after is not None and picture.range_after.int8_error > INT8_LIMIT


def warning(picture: Picture) -> str | None:
    """Return what int8 would do to a fused kernel of a wide range; None where nothing is to fear."""
    after = picture.range_after
    if after is None or not is_wide(picture):
        return None
    before = max((one.int8_error for one in picture.ranges_before), default=0.0)
    return (
        f"With one int8 scale for the whole tensor the rounding error would be {share_of(after.int8_error)} of the "
        f"weights' size, {share_of(before)} in the branches before. One scale for each output channel makes it "
        f"{share_of(after.int8_error_by_channel)}."
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
