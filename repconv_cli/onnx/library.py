"""The libraries that this room needs and the base installation does not have."""

from __future__ import annotations

import importlib
import importlib.util

from repconv_cli.errors import InputError

HINT = "Install them: pip install 'repconv-cli[onnx]'"


def require(*names: str) -> None:
    """Raise :class:`InputError` with what to install, unless all libraries called ``names`` are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX files need {' and '.join(missing)}, not installed here", hint=HINT)
