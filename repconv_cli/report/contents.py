"""Tensors in a terminal: those that differ in numbers alone, such as a stage's blocks, share a row."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from repconv_cli.report.words import plain
from repconv_cli.results import Contents, TensorFacts

MOST_ROWS = 40

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def contents_parts(contents: Contents, *, every: bool) -> Iterator[RenderableType]:
    """Yield a sentence and a table; ``every`` lists each tensor on its own."""
    dtypes = ", ".join(f"{plain(dtype)} {count:,}" for dtype, count in contents.values_by_dtype.items())
    yield Text(f"{len(contents.tensors):,} tensors with {contents.values:,} values ({dtypes}) in a {contents.format}.")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    rows = folded(contents.tensors, every=every)
    for name, count, first in rows[: None if every else MOST_ROWS]:
        shape = "×".join(map(str, first.shape)) or "one value"
        table.add_row(escape(plain(name)) + (f"  ×{count}" if count > 1 else ""), shape, escape(plain(first.dtype)))
    yield table
    if not every and len(rows) > MOST_ROWS:
        yield Text(f"… and {len(rows) - MOST_ROWS} more rows; --all lists each tensor")


def folded(tensors: tuple[TensorFacts, ...], *, every: bool) -> list[tuple[str, int, TensorFacts]]:
    """Return (name, count, first) of tensors that belong together: of one layer or of layers that a number tells apart.

    They have one shape and one dtype. With ``every``, each tensor is on its own.

    >>> names = ("a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias")
    >>> norms = tuple(TensorFacts(name, "float32", (2,)) for name in names)
    >>> [(name, count) for name, count, _ in folded(norms, every=False)]
    [('a.*.{weight,bias}', 2)]
    """
    groups: dict[object, list[TensorFacts]] = {}
    for tensor in tensors:
        layer = _NUMBER.sub("*", tensor.name.rpartition(".")[0] + ".")
        groups.setdefault(tensor.name if every else (layer, tensor.shape, tensor.dtype), []).append(tensor)
    return [(_name(group), len({t.name.rpartition(".")[0] for t in group}), group[0]) for group in groups.values()]


def _name(group: list[TensorFacts]) -> str:
    layers = dict.fromkeys(tensor.name.rpartition(".")[0] for tensor in group)
    leaves = dict.fromkeys(tensor.name.rpartition(".")[2] for tensor in group)
    layer = next(iter(layers)) if len(layers) == 1 else _NUMBER.sub("*", next(iter(layers)) + ".")[:-1]
    leaf = next(iter(leaves)) if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
    return f"{layer}.{leaf}" if layer else leaf
