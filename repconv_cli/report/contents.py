"""Tensors in a terminal: those that differ in numbers alone, such as a stage's blocks, share a row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from repconv_cli.report.words import lines, plain
from repconv_cli.results import Contents, TensorFacts

MOST_ROWS = 40
_GAP = 2

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def contents_parts(contents: Contents, width: int, *, every: bool) -> Iterator[RenderableType]:
    """Yield a table, and how many rows it leaves out; ``every`` lists each tensor on its own."""
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    table.add_column("tensor", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    rows = folded(contents.tensors, every=every)
    # One row more takes no more lines than to say that it is left out.
    shown = rows if every or len(rows) == MOST_ROWS + 1 else rows[:MOST_ROWS]
    figures = [("×".join(map(str, first.shape)) or "one value", plain(first.dtype)) for _, _, first in shown]
    room = width - sum(_GAP + max(map(len, column)) for column in zip(("shape", "dtype"), *figures, strict=True))
    for (name, count, _), (shape, dtype) in zip(shown, figures, strict=True):
        told = plain(name) + (f" ×{count}" if count > 1 else "")
        table.add_row(escape(lines(told, max(room, 8), 1)), shape, escape(dtype))
    yield table
    if len(rows) > len(shown):
        yield Text(f"… and {len(rows) - len(shown)} more rows; --all lists each tensor")


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


def grouped(names: Iterable[str]) -> list[str]:
    """Return names with those of one layer as one.

    >>> grouped(["a.bn.weight", "a.bn.bias", "a.conv.weight"])
    ['a.bn.{weight,bias}', 'a.conv.weight']
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    return [plain(_joined(layer, leaves)) for layer, leaves in layers.items()]


def _joined(layer: str, leaves: Iterable[str]) -> str:
    names = list(dict.fromkeys(leaves))
    leaf = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    return f"{layer}.{leaf}" if layer else leaf


def _name(group: list[TensorFacts]) -> str:
    layers = dict.fromkeys(tensor.name.rpartition(".")[0] for tensor in group)
    layer = next(iter(layers)) if len(layers) == 1 else _NUMBER.sub("*", next(iter(layers)) + ".")[:-1]
    return _joined(layer, (tensor.name.rpartition(".")[2] for tensor in group))
