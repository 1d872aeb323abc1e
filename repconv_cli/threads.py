"""How torch's threads wait for each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def wait_without_spinning() -> None:
    """Let a thread that waits for another give up its core; call it before torch is imported.

    By default it spins. Where other programs take a core, the thread that it waits for may be the one that has none,
    and each of the thousand short steps of a grouped convolution in float64 costs a time slice: minutes, not seconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def one_core_left() -> Iterator[None]:
    """Leave one core to the threads that hash and write, while torch computes what they write next.

    With as many threads as cores, each short step of torch waits for the one whose core is taken.
    """
    import torch

    count = torch.get_num_threads()
    torch.set_num_threads(max(1, count - 1))
    try:
        yield
    finally:
        torch.set_num_threads(count)
