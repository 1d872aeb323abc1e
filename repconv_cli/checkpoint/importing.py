"""Importing an installed library whose code the user asked for: without network, and with stdout left to the report."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from repconv_cli.errors import InputError

# Libraries look on the network for what is newer, or for what a name could be.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false"}


@contextlib.contextmanager
def library_code() -> Iterator[None]:
    """Run a library's code in the block: offline, and what it prints goes to stderr."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(_OFFLINE)
    hub = sys.modules.get("huggingface_hub.constants")
    was_offline = getattr(hub, "HF_HUB_OFFLINE", None)
    if hub is not None:
        # Read from the environment once, when it was imported.
        hub.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if hub is not None:
            hub.HF_HUB_OFFLINE = was_offline  # type: ignore[attr-defined]


def import_library(name: str, wanted_by: str) -> ModuleType:
    """Return an installed library's module.

    Raises:
        InputError: it is not installed, or fails when it is imported; ``wanted_by`` tells what needs it.
    """
    library = name.partition(".")[0]
    try:
        with library_code():
            return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{wanted_by} needs {library}, which is not installed", hint=f"pip install {library}"
        ) from error
