"""How torch's threads wait for each other."""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Let a thread that waits for another give up its core; call it before torch is imported.

    By default it spins. Where other programs take a core, the thread that it waits for may be the one that has none,
    and each of the thousand short steps of a grouped convolution in float64 costs a time slice: minutes, not seconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
