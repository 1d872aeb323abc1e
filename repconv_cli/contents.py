"""What weights without a graph hold, told from their headers: the one thing that can be inspected of them.

No torch here: a file of any size is told in a fraction of a second.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

from repconv_cli.checkpoint.families.find import STATISTICS, FamilyBlock, find_blocks
from repconv_cli.checkpoint.families.recognise import family_of
from repconv_cli.checkpoint.families.shapes import fused_shape, outputs_of
from repconv_cli.checkpoint.families.words import assumptions, branches_of, kind_of, notes
from repconv_cli.checkpoint.listing import Claim, Listing, list_weights
from repconv_cli.options import Options
from repconv_cli.results import BlockFacts, Change, Contents, InputFacts, Result, SourceFacts, TensorFacts, Totals

_UNKNOWN = Change(None, None)
_NO_PARAMETERS = (*STATISTICS, "num_batches_tracked")


def inspect_contents(source: str | Path, options: Options) -> Result | None:
    """Return what weights ``source`` holds; None where there is a graph to inspect, or an architecture for one."""
    if options.arch is not None:
        return None
    start = time.perf_counter()
    found = list_weights(source, state_key=options.state_key, trust=options.trust)
    if found is None or not found.tensors:
        return None
    contents = _contents(found)
    blocks, told, is_known = _blocks(found, options)
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
            (*found.notes, *told),
        ),
        InputFacts((), (), False),
        blocks,
        totals=Totals(_UNKNOWN, _UNKNOWN, _UNKNOWN, _parameters(found, blocks, is_known), _UNKNOWN),
        contents=contents,
        seconds={"Reading": time.perf_counter() - start},
    )


def _parameters(listing: Listing, blocks: tuple[BlockFacts, ...], is_known: bool) -> Change:
    """Return the parameters before and after; those after are known where the family is."""
    counts = {name: _count(claim) for name, claim in listing.tensors.items()}
    before = sum(count for name, count in counts.items() if not name.endswith(_NO_PARAMETERS))
    saved = sum((block.params.before or 0) - (block.params.after or 0) for block in blocks)
    return Change(before, before - saved if is_known else None)


def _blocks(listing: Listing, options: Options) -> tuple[tuple[BlockFacts, ...], tuple[str, ...], bool]:
    """Return the blocks of the family that the names are of, what is told of them, and whether there is a family."""
    shapes = {name: claim.shape for name, claim in listing.tensors.items()}
    family = family_of(shapes)
    if family is None:
        return (), ("these keys are of no known family: what can be fused is told with --arch",), False
    found = find_blocks(family, shapes)
    facts = tuple(_block(block, shapes) for block in found.blocks)
    assumed = (f"assumed: {one}" for one in assumptions(found, options.eps))
    return facts, (*notes(found), *assumed), True


def _block(block: FamilyBlock, shapes: dict[str, tuple[int, ...]]) -> BlockFacts:
    branches = branches_of(block.part, shapes)
    weight = fused_shape(block.part, shapes)
    before = sum(math.prod(shapes[key]) for key in block.sources if not key.endswith(STATISTICS))
    after = math.prod(weight) + outputs_of(block.part, shapes)
    return BlockFacts(
        block.name,
        kind_of(branches),
        branches,
        block.sources,
        f"{block.target}.weight",
        weight,
        _UNKNOWN,
        _UNKNOWN,
        Change(before, after),
    )


def _contents(found: Listing) -> Contents:
    by_dtype: dict[str, int] = {}
    for claim in found.tensors.values():
        by_dtype[claim.dtype] = by_dtype.get(claim.dtype, 0) + _count(claim)
    tensors = tuple(TensorFacts(name, claim.dtype, claim.shape) for name, claim in found.tensors.items())
    return Contents(found.format.value, tensors, by_dtype, sum(by_dtype.values()))


def _count(claim: Claim) -> int:
    return math.prod(claim.shape)
