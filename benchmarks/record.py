"""What is measured of one model, as plain data: written as JSON by one process, read and rendered by another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Counts:
    """What a graph is made of; ``macs`` are multiply-accumulates of one sample."""

    convs: int
    norms: int
    ops: int
    params: int
    macs: int


@dataclass(frozen=True)
class Spread:
    """The median of a ratio over the rounds of one interleaved run, with its 95 % interval."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Latency:
    """How many times as long as repconv's model the original takes, and the one of the library's own converter."""

    milliseconds: float
    original: Spread
    own: Spread | None = None


@dataclass
class Record:
    """The figures of one model; a part that could not be measured is None, and ``problems`` say why, one line each."""

    name: str
    commit: str = ""
    own_name: str | None = None
    convs_by_hand: int | None = None
    before: Counts | None = None
    after: Counts | None = None
    own: Counts | None = None
    blocks: int | None = None
    float32_difference: float | None = None
    float64_difference: float | None = None
    certificate: float | None = None
    trace_seconds: float | None = None
    export_seconds: float | None = None
    plan_seconds: float | None = None
    fuse_seconds: float | None = None
    all_seconds: float | None = None
    weight_bytes: int | None = None
    peak_bytes: int | None = None
    eager: Latency | None = None
    onnx: Latency | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(path: Path) -> Record:
        """Return the record that :meth:`write` wrote."""
        data = json.loads(path.read_text())
        for name in ("before", "after", "own"):
            data[name] = data[name] and Counts(**data[name])
        for name in ("eager", "onnx"):
            data[name] = data[name] and _latency(data[name])
        return Record(**data)


def _latency(data: dict) -> Latency:  # type: ignore[type-arg]
    own = data["own"] and Spread(**data["own"])
    return Latency(data["milliseconds"], Spread(**data["original"]), own)
