"""How much resident memory one call takes at its peak, where the system tells."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Return by how many bytes resident memory grows while ``run`` is called; None where that cannot be known.

    Linux keeps the highest value since it was last reset. What ``run`` allocated before and kept is not counted.
    """
    gc.collect()
    try:
        # What earlier calls freed goes back to the system first, else the peak hides in it.
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except (AttributeError, OSError, LookupError, ValueError):
        return None


def _resident(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)
