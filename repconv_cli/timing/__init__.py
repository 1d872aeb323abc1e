"""The gain: the original and the fused model timed side by side, in the runtimes that are installed."""

from __future__ import annotations

from repconv_cli.timing.runtimes import RUNTIMES, measure_runtime

__all__ = ["RUNTIMES", "measure_runtime"]
