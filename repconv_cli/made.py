"""What a command made of a source: the report, the tensors to write, and what the file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repconv_cli import __version__
from repconv_cli.opening import FORMAT_VERSION
from repconv_cli.outputs import Writable
from repconv_cli.results import Result, SourceFacts, Verification


@dataclass(frozen=True)
class Made:
    """A fused model that is not written yet."""

    result: Result
    output: Writable
    metadata: dict[str, str]


def metadata(
    source: SourceFacts,
    key_map: Mapping[str, Sequence[str]],
    verification: Verification,
    figures: Mapping[str, float],
    *,
    graph: str | None = None,
    family: tuple[str, float | None] | None = None,
) -> dict[str, str]:
    """Return the file's metadata; no time and no absolute path, so that equal input gives equal bytes.

    ``family`` is the name of the deploy form's family, and the eps that was assumed, None where the graph told it.
    """
    told = {
        "verdict": verification.verdict,
        "max_abs": verification.max_abs,
        "noise": verification.noise,
        "ratio": verification.ratio,
        **figures,
    }
    written = {
        "format": "pt",
        "repconv.format": FORMAT_VERSION,
        "repconv.version": __version__,
        "repconv.source": json.dumps({"name": Path(source.name).name, "sha256": source.sha256}),
        "repconv.key_map": json.dumps({key: list(sources) for key, sources in key_map.items()}),
        "repconv.verification": json.dumps(told),
    }
    if family is not None:
        name, eps = family
        written |= {"repconv.target": "deploy", "repconv.family": name}
        written |= {} if eps is None else {"repconv.eps": repr(eps)}
    return written if graph is None else {**written, "repconv.graph": graph}
