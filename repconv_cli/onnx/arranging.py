"""What becomes of each axis, its size and whether that is free, when axes are moved, merged, added or dropped."""

from __future__ import annotations

from math import prod
from typing import Any

from repconv_cli.graph.arrange import Size
from repconv_cli.onnx.table import aten


def arranged(target: Any, args: tuple[Any, ...], sizes: list[Size]) -> list[Size]:
    """Return the sizes after ``target``, as they were where it moves no axis; ``args`` follow the first operand.

    >>> arranged(aten.flatten.using_ints, (1, 2), [(2, True), (3, False), (5, False)])
    [(2, True), (15, False)]
    """
    if target is aten.permute.default:
        return [sizes[axis] for axis in args[0]]
    if target is aten.unsqueeze.default:
        return [*sizes[: args[0]], (1, False), *sizes[args[0] :]]
    if target is aten.squeeze.dims:
        return [size for axis, size in enumerate(sizes) if axis not in args[0]]
    if target is aten.flatten.using_ints:
        first, last = args[0], args[1] % len(sizes)
        merged = sizes[first : last + 1]
        whole = (prod(size for size, _ in merged), any(is_free for _, is_free in merged))
        return [*sizes[:first], whole, *sizes[last + 1 :]]
    if target is aten.reshape.default:
        values, held = prod(size for size, _ in sizes), prod(size for size in args[0] if size != -1)
        return [(values // held, any(free for _, free in sizes)) if size == -1 else (size, False) for size in args[0]]
    return sizes
