"""The graph in a file as JSON Schema: ``python -m repconv_cli.graph.schema`` writes ``graph.schema.json``."""

from __future__ import annotations

import json
from inspect import cleandoc
from pathlib import Path

import msgspec

from repconv_cli.graph.serial import GRAPH_VERSION, GraphSpec

PUBLISHED = Path(__file__).with_name("graph.schema.json")


def graph_schema() -> str:
    """Return the schema as JSON text. What it cannot say (an operator that is not listed) the reader checks."""
    schema = {"title": f"repconv graph, version {GRAPH_VERSION}", **msgspec.json.schema(GraphSpec)}
    for part in schema["$defs"].values():
        # Some versions of msgspec leave the indentation of a docstring in it.
        part["description"] = cleandoc(part["description"])
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    PUBLISHED.write_text(graph_schema())
