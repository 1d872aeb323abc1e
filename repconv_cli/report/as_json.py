"""Results and errors as one JSON document."""

from __future__ import annotations

import json
import math
from typing import Any

from repconv_cli.errors import RepconvError
from repconv_cli.results import RESULT_VERSION, Result


def result_json(result: Result) -> str:
    """Return ``result`` as JSON; a figure that is not finite, or not known, is null."""
    return json.dumps(_finite(result.json()), allow_nan=False, ensure_ascii=True)


def error_json(error: RepconvError) -> str:
    """Return ``error`` as JSON, with the exit code of the command."""
    parts = {"where": error.where, "found": error.found, "needed": error.needed, "hint": error.hint}
    return json.dumps({"version": RESULT_VERSION, "error": {**parts, "exit_code": error.exit_code}})


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
