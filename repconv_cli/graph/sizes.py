"""What all sizes become when the free ones change: shapes without values, the graph run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from repconv_cli.errors import InputError
from repconv_cli.graph.kept import quiet
from repconv_cli.graph.program import InputInfo, Program

# These give a view or one number of what they are given, at no cost.
_PICKS = {torch.ops.aten.select.int, torch.ops.aten.item.default}

# What is done to free sizes (of the batch, then of each spatial axis), no two axes alike: first they get smaller, the
# second more than the first; then larger, the first less than the second, with each remainder by 2, 3 and 4 among them.
_SMALLER = (Fraction(1), Fraction(3, 4), Fraction(3, 5), Fraction(1, 2))
_LARGER = ((0, 1, 2, 3), (0, 2, 3, 1), (5, 35, 49, 38))
# A tensor larger than this is no model's.
MOST_BYTES = 1 << 34


@dataclass(frozen=True)
class Sizes:
    """The shape of each tensor and the value of each size, for one choice of the free sizes."""

    shapes: dict[fx.Node, tuple[int, ...]]
    values: dict[fx.Node, int]


def other_sizes(program: Program) -> Iterator[Sizes]:
    """Yield the sizes at other choices of the free ones, smaller and larger, as far as the graph takes them.

    With nothing free but the batch there is one choice, of another batch.
    """
    has_free_space = any(size is None for info in program.inputs for size in info.shape[1:])
    larger = [partial(_grown, by) for by in _LARGER]
    changes: list[Callable[[int, int], int]] = [_shrunk, *larger] if has_free_space else [larger[-1]]
    for change in changes:
        shapes = [_changed(info, change) for info in program.inputs]
        if shapes == [info.example for info in program.inputs]:
            continue
        found = propagate(program, shapes)
        if found is not None:
            yield found


def _shrunk(size: int, axis: int) -> int:
    return int(size * _SMALLER[axis])


def _grown(by: tuple[int, ...], size: int, axis: int) -> int:
    return size + by[axis]


def _changed(info: InputInfo, change: Callable[[int, int], int]) -> tuple[int, ...]:
    """Return the example's shape with each free size changed, none of them below the smallest that there may be.

    Of images the third axis is the first in space, of tokens the second; more axes than a volume has are as its last.
    """
    before_space = 1 if len(info.shape) > 3 else 0

    def changed(axis: int, size: int) -> int:
        place = min(axis - before_space, len(_SMALLER) - 1) if axis else 0
        return max(change(size, place), info.smallest[axis] if info.smallest else 1)

    return tuple(changed(axis, size) if info.shape[axis] is None else size for axis, size in enumerate(info.example))


def other_size(info: InputInfo, axis: int) -> int:
    """Return a size of one axis that is another one behind strides as well: larger and smaller in turns."""
    size = info.example[axis]
    if info.shape[axis] is not None:
        return size
    return size + 33 if axis % 2 == 0 else max(size * 3 // 4 - 1, info.smallest[axis] if info.smallest else 1)


def propagate(program: Program, inputs: list[tuple[int, ...]]) -> Sizes | None:
    """Return all sizes for ``inputs`` of these shapes, None where an operator does not take them."""
    values: dict[fx.Node, Any] = {}
    try:
        for node, value in fake_values(program, inputs):
            values[node] = value
    except Exception:  # noqa: BLE001 - an operator may reject a size in any way
        return None
    shapes = {node: tuple(value.shape) for node, value in values.items() if isinstance(value, Tensor)}
    return Sizes(shapes, {node: value for node, value in values.items() if isinstance(value, int)})


def check_sizes(program: Program) -> None:
    """Run a graph from a file at its example sizes, without values and without memory for them.

    Raises :class:`InputError` where an operator does not take what it is given, or gives a tensor that no model has.
    """
    last: fx.Node | None = None
    try:
        for node, value in fake_values(program, [info.example for info in program.inputs]):
            last = node
            for tensor in pytree.tree_leaves(value):
                if isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() > MOST_BYTES:
                    raise InputError(f"its graph makes a tensor of {tuple(tensor.shape)} at {node.name}")
    except InputError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = "".join(c for c in lines[0] if c.isprintable())[:160] if lines else type(error).__name__
        place = "its first node" if last is None else f"the node after {last.name}"
        raise InputError(f"its graph does not fit together at {place}: {detail}") from error


def fake_values(program: Program, inputs: list[tuple[int, ...]]) -> Iterator[tuple[fx.Node, Any]]:
    """Yield every node with its value as a fake tensor (or a size), for inputs of these shapes.

    A number that is picked from a stored tensor, such as a detector's stride, is that number; of any other it is 1.
    """
    given = iter(zip(inputs, program.inputs, strict=True))
    values: dict[fx.Node, Any] = {}
    known: dict[fx.Node, Tensor] = {}
    with torch.no_grad(), quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for node in program.graph.nodes:
            if node.op == "placeholder":
                shape, info = next(given)
                values[node] = torch.empty(shape, dtype=info.dtype)
            elif node.op == "get_attr":
                known[node] = program.tensors[str(node.target)]
                values[node] = mode.from_tensor(known[node])
            elif node.target in _PICKS and node.args[0] in known:
                with unset_fake_temporarily():
                    value = _call(node, lambda n: known[n])
                if isinstance(value, Tensor):
                    known[node] = value
                values[node] = mode.from_tensor(value) if isinstance(value, Tensor) else value
            elif node.target is torch.ops.aten.item.default:
                # A number of the values themselves, which nothing here has; no shape depends on it.
                values[node] = 1.0 if values[node.args[0]].is_floating_point() else 1
            elif node.op == "call_function":
                values[node] = _call(node, lambda n: values[n])
            else:
                return
            yield node, values[node]


def _call(node: fx.Node, fetch: Callable[[fx.Node], Any]) -> Any:
    assert callable(node.target)
    return node.target(*map_arg(node.args, fetch), **map_arg(node.kwargs, fetch))
