"""The JSON schema of what ``--json`` prints, made from the result classes; the copy in ``schemas/`` is tested.

``python -m repconv_cli.report.schema`` writes that copy. A field is added without a new version; one that changes
its meaning, or goes, makes a new one.
"""

from __future__ import annotations

import json
import re
from inspect import cleandoc
from pathlib import Path
from typing import Any

import msgspec

from repconv_cli.results import RESULT_VERSION, Result

PATH = Path(__file__).with_name("schemas") / f"result-{RESULT_VERSION}.json"

_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "title": "Error",
    "description": "Why a command could not run: the place, what was found, what was needed, what to do.",
    "type": "object",
    "properties": {
        "version": {"const": RESULT_VERSION},
        "error": {
            "type": "object",
            "properties": {
                "where": _TEXT_OR_NULL,
                "found": {"type": "string"},
                "needed": _TEXT_OR_NULL,
                "hint": _TEXT_OR_NULL,
                "exit_code": {"type": "integer"},
            },
            "required": ["where", "found", "needed", "hint", "exit_code"],
        },
    },
    "required": ["version", "error"],
}


def schema() -> dict[str, Any]:
    """Return the schema: one document is a result or an error."""
    (_,), parts = msgspec.json.schema_components([Result], ref_template="#/$defs/{name}")
    definitions = _with_nulls(parts)
    result = definitions["Result"]
    del result["properties"]["drawing"]
    result["properties"] = {"version": {"const": RESULT_VERSION}, **result["properties"]}
    for part in definitions.values():
        # Some versions of msgspec leave the indentation of a docstring in it.
        part["description"] = cleandoc(part["description"])
        # Every field is always there: what is not known is null, what is not there is empty.
        part["required"] = list(part["properties"])
        for field in part["properties"].values():
            field.pop("default", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"repconv --json, version {RESULT_VERSION}",
        "anyOf": [{"$ref": "#/$defs/Result"}, {"$ref": "#/$defs/Error"}],
        "$defs": {name: definitions[name] for name in _reached("Result", definitions)} | {"Error": _ERROR},
    }


def _reached(start: str, definitions: dict[str, Any]) -> list[str]:
    """Return the definitions that ``start`` refers to, and itself."""
    found: dict[str, None] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = None
            waiting += re.findall(r'"#/\$defs/(\w+)"', json.dumps(definitions[name]))
    return sorted(found)


def _with_nulls(value: Any) -> Any:
    """Return a schema in which every figure may be null: it is not known, or not finite."""
    if isinstance(value, dict):
        changed = {key: _with_nulls(item) for key, item in value.items()}
        return changed | {"type": ["number", "null"]} if value.get("type") == "number" else changed
    return [_with_nulls(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Write the copy in the repository."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
