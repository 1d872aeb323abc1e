"""What weights without a graph hold, told from their headers: the one thing that can be inspected of them.

No torch here: a file of any size is told in a fraction of a second.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from repconv_cli.checkpoint.listing import Claim, Listing, list_weights
from repconv_cli.options import Options
from repconv_cli.results import Change, Contents, InputFacts, Result, SourceFacts, TensorFacts, Totals

_UNKNOWN = Change(None, None)


def inspect_contents(source: str | Path, options: Options) -> Result | None:
    """Return what weights ``source`` holds; None where there is a graph to inspect, or an architecture for one."""
    if options.arch is not None:
        return None
    start = time.perf_counter()
    found = list_weights(source, state_key=options.state_key, trust=options.trust)
    if found is None or not found.tensors:
        return None
    contents = _contents(found)
    note = "these are weights alone: what of them can be fused is told with --arch"
    return Result(
        "inspect",
        SourceFacts(
            str(source),
            "weights",
            None,
            found.size_bytes,
            max(contents.values_by_dtype, key=lambda dtype: contents.values_by_dtype[dtype]),
            len(found.tensors),
            False,
            (*found.notes, note),
        ),
        InputFacts((), (), False),
        totals=Totals(_UNKNOWN, _UNKNOWN, _UNKNOWN, Change(contents.values, None), _UNKNOWN),
        contents=contents,
        seconds={"Reading": time.perf_counter() - start},
    )


def _contents(found: Listing) -> Contents:
    by_dtype: dict[str, int] = {}
    for claim in found.tensors.values():
        by_dtype[claim.dtype] = by_dtype.get(claim.dtype, 0) + _count(claim)
    tensors = tuple(TensorFacts(name, claim.dtype, claim.shape) for name, claim in found.tensors.items())
    return Contents(found.format.value, tensors, by_dtype, sum(by_dtype.values()))


def _count(claim: Claim) -> int:
    return math.prod(claim.shape)
