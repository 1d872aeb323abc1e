"""What the commands find, as plain data: the report prints it, ``--json`` dumps it. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

RESULT_VERSION = 1


@dataclass(frozen=True)
class Change:
    """A count before and after; None where it cannot be known."""

    before: int | None
    after: int | None


@dataclass(frozen=True)
class SourceFacts:
    """What the source is, and what was looked through to read it."""

    name: str
    kind: str
    sha256: str | None
    size_bytes: int | None
    dtype: str
    tensors: int
    was_training: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputFacts:
    """The input that the model was traced with; ``shape`` has None where any size is allowed."""

    shapes: tuple[tuple[int | None, ...], ...]
    examples: tuple[tuple[int, ...], ...]
    is_guessed: bool


@dataclass(frozen=True)
class BlockFacts:
    """One block. ``certificate`` is its float64 error relative to its scale, and the limit; None before ``fuse``."""

    name: str
    kind: str
    branches: tuple[str, ...]
    sources: tuple[str, ...]
    target: str | None
    weight_shape: tuple[int, ...]
    ops: Change
    macs: Change
    params: Change
    certificate: dict[str, float] | None = None


@dataclass(frozen=True)
class RefusalFacts:
    """What looked like a candidate and was left as it is."""

    name: str
    node: str
    reason: str


@dataclass(frozen=True)
class Totals:
    """Counts of the whole model."""

    convs: Change
    norms: Change
    ops: Change
    params: Change
    macs: Change


@dataclass(frozen=True)
class LargestError:
    """The one value of the first tensor that is off which is farthest from what it should be."""

    key: str
    index: tuple[int, ...]
    expected: float
    found: float


@dataclass(frozen=True)
class TensorFacts:
    """One tensor, as the file's header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """What weights without a graph hold; no value has been read."""

    format: str
    tensors: tuple[TensorFacts, ...]
    values_by_dtype: dict[str, int]
    values: int


@dataclass(frozen=True)
class Verification:
    """The verdict on outputs, and the figures behind it.

    ``max_abs`` is the largest difference, ``noise`` how far the original in its own dtype is from its float64 run,
    ``ratio`` the difference in units of the noise (or of 4 ulp of the range, if larger), ``limit`` what is allowed.
    ``close``, ``max_rel``, ``top1`` and ``float64`` are shares of 1.
    """

    verdict: str
    passed: bool
    close: float | None
    max_abs: float | None
    max_rel: float | None
    noise: float | None
    ratio: float | None
    limit: float | None
    top1: float | None
    float64: float | None
    per_sample: tuple[dict[str, float], ...] = ()
    first_bad_block: str | None = None
    looks_like: str | None = None
    largest_error: LargestError | None = None
    tensors_checked: int = 0
    assumptions: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.passed


@dataclass(frozen=True)
class RuntimeFacts:
    """The gain in one runtime: median milliseconds of one call, and the original's time over the fused one's.

    ``gain`` is ``gain``, ``loss``, or ``none`` where the interval of the speed-up holds 1. ``problem`` says why a
    runtime has no times. Peaks are the bytes by which resident memory grows during one call. A spread is the distance
    of the times' quartiles: half of the rounds lie within it.
    """

    runtime: str
    version: str
    original_ms: float | None = None
    fused_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    rounds: int = 0
    gain: str | None = None
    original_peak_bytes: int | None = None
    fused_peak_bytes: int | None = None
    original_spread_ms: float | None = None
    fused_spread_ms: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class BenchFacts:
    """What the models were timed with, and the gain in each runtime."""

    shapes: tuple[tuple[int, ...], ...]
    threads: int
    processor: str
    runtimes: tuple[RuntimeFacts, ...]


@dataclass(frozen=True)
class OutputFacts:
    """The file that was written (or, in a dry run, would have been)."""

    path: str
    size_bytes: int
    sha256: str
    is_dry_run: bool


@dataclass(frozen=True)
class NodeFacts:
    """One operator of a graph; ``inputs`` are places of others in the graph, ``block`` the place of its block."""

    name: str
    op: str
    module: str
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    inputs: tuple[int, ...]
    block: int | None = None


@dataclass(frozen=True)
class KernelFacts:
    """A kernel on the taps of the fused one: its own extent, the rms of each tap, the taps of some channel pairs."""

    label: str
    extent: tuple[int, ...]
    rms: tuple[float, ...]
    slices: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RangeFacts:
    """The range of a weight, and what rounding it to int8 would do: the error's rms as a share of the weight's.

    ``int8_error`` is that with one scale for the tensor, ``int8_error_by_channel`` with one for each output channel.
    """

    name: str
    low: float
    high: float
    rms: float
    int8_error: float
    int8_error_by_channel: float


@dataclass(frozen=True)
class Picture:
    """What can be seen of one block: kernels (each of ``taps`` rows and columns) and ranges.

    ``pairs`` are the (output, input) channels whose taps each kernel shows; ``note`` says why there is no kernel.
    """

    taps: tuple[int, int] = (1, 1)
    pairs: tuple[tuple[int, int], ...] = ()
    branches: tuple[KernelFacts, ...] = ()
    fused: KernelFacts | None = None
    ranges_before: tuple[RangeFacts, ...] = ()
    range_after: RangeFacts | None = None
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """What a page shows beside the figures: a picture of each block, and the graph before and after.

    Both are empty where no graph is known.
    """

    before: tuple[NodeFacts, ...]
    after: tuple[NodeFacts, ...]
    blocks: tuple[BlockFacts, ...]
    pictures: tuple[Picture, ...]

    @property
    def has_graph(self) -> bool:
        """Whether the graph is known."""
        return bool(self.before)


@dataclass(frozen=True)
class Result:
    """What one command found. ``command`` is ``inspect``, ``fuse``, ``verify`` or ``bench``.

    ``drawing`` is there where a page was asked for, and is no part of the JSON.
    """

    command: str
    source: SourceFacts
    input: InputFacts
    blocks: tuple[BlockFacts, ...] = ()
    refusals: tuple[RefusalFacts, ...] = ()
    totals: Totals | None = None
    verification: Verification | None = None
    output: OutputFacts | None = None
    bench: BenchFacts | None = None
    contents: Contents | None = None
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    drawing: Drawing | None = None

    def json(self) -> dict[str, Any]:
        """Return the result as JSON-ready values, without the drawing."""
        values = asdict(replace(self, drawing=None))
        del values["drawing"]
        return {"version": RESULT_VERSION, **values}

    def exit_code(self, strict: bool) -> int:
        """Return 0, or 1 where outputs differ, or if ``strict`` where something was refused, unchecked or not there."""
        verification = self.verification
        if verification is not None and not verification.passed:
            return 1
        is_incomplete = bool(self.refusals) or (verification is not None and verification.verdict != "pass")
        has_nothing = self.command == "fuse" and not self.blocks
        return int(strict and (is_incomplete or has_nothing))
