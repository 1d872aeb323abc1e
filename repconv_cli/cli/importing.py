"""Imports of a command, without the collections of garbage that they set off."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while modules are imported, nor later among what they hold: it stays until the end.

    Python would walk over all that torch holds again and again, for a tenth of the time until a command begins.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
