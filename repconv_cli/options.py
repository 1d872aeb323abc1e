"""What the user may set, by the command line's names. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_RATIO = 10.0
"""The largest difference of outputs that passes, in units of the original's own rounding noise (DESIGN §4)."""


@dataclass(frozen=True)
class Limits:
    """What the judgement of outputs allows: ``max_ratio`` times the noise, or |Δ| ≤ atol + rtol·|y| where given."""

    max_ratio: float = MAX_RATIO
    rtol: float | None = None
    atol: float | None = None

    @property
    def is_by_value(self) -> bool:
        """Whether each value has a limit of its own, in place of the noise."""
        return self.atol is not None or self.rtol is not None


@dataclass(frozen=True)
class Options:
    """How a source is opened, what of it is fused, and how the result is judged.

    ``input`` gives the shapes of positional inputs, ``inputs`` a file with named ones, and ``example`` the call itself:
    (positional arguments, keyword arguments) of tensors. With one of the last two, outputs are compared on that.
    ``draw`` makes what a page shows.
    ``target`` is ``full`` or ``deploy``; None is full where a graph is known, deploy for weights alone. ``eps`` is that
    of all norms of weights alone, None for what their family uses.
    """

    arch: str | None = None
    input: tuple[tuple[int, ...], ...] = ()
    inputs: Path | None = None
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    samples: int = 4
    seed: int = 0
    limits: Limits = Limits()
    state_key: str | None = None
    trust: tuple[str, ...] = ()
    blocks: str | None = None
    strict: bool = False
    draw: bool = False
    target: str | None = None
    eps: float | None = None


@dataclass(frozen=True)
class Timing:
    """How ``bench`` times: in which runtimes (all that are installed), threads, samples in a batch, seconds in each."""

    runtimes: tuple[str, ...] = ()
    threads: int = 1
    batch: int | None = None
    seconds: float = 5.0
