"""What the figures mean, in one sentence each."""

from __future__ import annotations

import re

from repconv_cli.quantities import size_of
from repconv_cli.report.words import arrow, counted, number, percent, plain, share_of
from repconv_cli.results import Contents, LargestError, RefusalFacts, Result, Totals, Verification

_FIGURES = re.compile(r"\d[\d.,]*")
_KINDS = {
    "module": "PyTorch module",
    "weights": "weights with their architecture",
    "program": "torch.export program",
    "onnx": "ONNX model",
    "fused": "fused by repconv",
}


def what_it_is(result: Result) -> str:
    """Return the kind of the source, its tensors and its size."""
    source = result.source
    kind = "weights alone" if result.contents is not None else _KINDS.get(source.kind, source.kind)
    parts = [plain(kind), counted(source.tensors, "tensor"), source.dtype]
    return " · ".join(parts if source.size_bytes is None else [*parts, size_of(source.size_bytes)])


def headline(result: Result) -> str:
    """Return how many blocks there are, and what is gained; what is held, where it is of no known family."""
    if result.contents is not None and is_unknown(result):
        return held(result.contents)
    if not result.blocks:
        return "Nothing to fuse: every linear unit is a single operator already."
    verb = "can be fused" if result.command == "inspect" else "fused, each proven"
    gain = "" if result.totals is None else gains(result.totals)
    gain = f": {gain}" if gain else ""
    return f"{counted(len(result.blocks), 'block')} {verb}{gain}."


def name_for_output(result: Result) -> str:
    """Return the name that stands for an output in the next command."""
    return "OUT.onnx" if result.source.kind == "onnx" else "OUT.safetensors"


def is_unknown(result: Result) -> bool:
    """Whether nothing can be said but which tensors there are: weights alone, of no known family."""
    totals = result.totals
    return result.contents is not None and (totals is None or totals.params.after is None)


def held(contents: Contents) -> str:
    """Return what weights hold."""
    dtypes = contents.values_by_dtype
    if len(dtypes) == 1:
        return (
            f"{counted(len(contents.tensors), 'tensor')} with {contents.values:,} {plain(next(iter(dtypes)))} values."
        )
    told = ", ".join(f"{plain(dtype)} {count:,}" for dtype, count in dtypes.items())
    return f"{counted(len(contents.tensors), 'tensor')} with {contents.values:,} values ({told})."


def gains(totals: Totals) -> str:
    """Return the change of layers, and of parameters and work where these change."""
    counts = (("convolutions", totals.convs), ("batch norms", totals.norms))
    parts = [f"{label} {arrow(change)}" for label, change in counts if change.before is not None]
    for label, change in (("parameters", totals.params), ("MACs", totals.macs)):
        if change.before != change.after and percent(change):
            parts.append(f"{label} {percent(change)}")
    return ", ".join(parts)


def proof(result: Result) -> str | None:
    """Return the worst certificate, None where no block has one."""
    proofs = [block.certificate for block in result.blocks if block.certificate is not None]
    if not proofs:
        return None
    worst = max(proof["error"] for proof in proofs)
    return (
        f"{len(proofs)} of {counted(len(result.blocks), 'block')} equal in float64; worst {worst:.1e} of its scale "
        f"(limit {proofs[0]['limit']:.0e})"
    )


def outputs(verification: Verification) -> str:
    """Return how far the outputs are apart, beside the original's own rounding noise."""
    text = (
        f"largest difference {verification.max_abs:.1e}, {verification.ratio or 0.0:.2g}× the original's own "
        "rounding noise"
    )
    if verification.close is not None:
        text += f"; {share_of(verification.close)} of the values close"
    if verification.top1 is not None:
        text += f"; same largest class in {share_of(verification.top1)}"
    return text


def written(result: Result) -> str:
    """Return where the output lies, and its size before and after."""
    output = result.output
    if output is None:
        return "Nothing was written."
    verb = "Would write" if output.is_dry_run else "Wrote"
    before = "" if result.source.size_bytes is None else f"{size_of(result.source.size_bytes)} → "
    return f"{verb:<9} {plain(output.path)}   {before}{size_of(output.size_bytes)}   sha256 {output.sha256[:16]}…"


def place_of(error: LargestError) -> str:
    """Return the place of the largest error, and both values there."""
    place = ", ".join(map(str, error.index))
    return f"{plain(error.key)}[{place}] is {number_of(error.found)}, expected {number_of(error.expected)}"


def number_of(value: float) -> str:
    """Return a weight with four digits."""
    return f"{value:.4g}"


def verdict(result: Result, verification: Verification) -> tuple[str, str]:
    """Return the verdict in one word, and what it means for someone who sees it for the first time."""
    name = plain(result.source.name)
    if verification.passed and result.command == "fuse" and result.output is None:
        return "REFUSED", "--strict: see what was left or not checked above; the outputs agree."
    if verification.verdict == "pass":
        return "PASS", f"the fused file computes what {name} computes."
    if verification.verdict == "partial":
        return "PARTIAL", f"nothing differs from {name}, but not all was checked."
    where = f" First block that is off: {plain(verification.first_bad_block)}." if verification.first_bad_block else ""
    looks = f" Looks like: {plain(verification.looks_like)}." if verification.looks_like else ""
    what = "outputs" if verification.max_abs is not None else "weights"
    return "FAIL", f"do not use this file: its {what} are not those of {name}.{where}{looks}"


def left(result: Result, most: int = 1) -> list[tuple[str, str]]:
    """Return (names, reason) of the refusals, those of one kind of reason together, the most frequent first.

    Reasons that differ in figures alone are of one kind. Of the names, ``most`` are told and the others counted.
    """
    kinds: dict[str, list[RefusalFacts]] = {}
    for refusal in result.refusals:
        kinds.setdefault(_FIGURES.sub("#", refusal.reason), []).append(refusal)
    told = []
    for alike in sorted(kinds.values(), key=len, reverse=True):
        names = [plain(refusal.name) for refusal in alike]
        more = f" and {number(len(names) - most)} more" if len(names) > most else ""
        others = "; the others alike" if len({refusal.reason for refusal in alike}) > 1 else ""
        told.append((", ".join(names[:most]) + more, plain(alike[0].reason) + others))
    return told
