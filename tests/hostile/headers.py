"""safetensors files made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def header_file(
    table: dict[str, Any] | bytes, data: int | bytes, length: int | None = None
) -> Callable[[Path], object]:
    """Return a writer of a file with this header and so many bytes after it; ``length`` is what it claims to be."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    content = bytes(data) if isinstance(data, int) else data
    size = (len(text) if length is None else length).to_bytes(8, "little")
    return lambda path: path.write_bytes(size + text + content)


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    """Return a tensor's entry in the header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
