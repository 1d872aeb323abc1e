"""What all sizes become when the free ones change: shapes without values, the graph run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from repconv_cli.graph.borrowed import quiet
from repconv_cli.graph.program import Program

# By how much free sizes are grown: a little, and beyond the usual stride of a whole network.
GROWTHS = (1, 2, 3, 33, 66)


@dataclass(frozen=True)
class Sizes:
    """The shape of each tensor and the value of each size, for one choice of the free sizes."""

    shapes: dict[fx.Node, tuple[int, ...]]
    values: dict[fx.Node, int]


def other_sizes(program: Program) -> Iterator[Sizes]:
    """Yield the sizes with all free spatial sizes grown, as far as the graph takes them.

    With nothing free but the batch there is one choice, of another batch.
    """
    has_free_space = any(size is None for info in program.inputs for size in info.shape[1:])
    for growth in GROWTHS if has_free_space else (1,):
        shapes = [
            tuple(
                size + (growth if info.shape[axis] is None and (axis > 0) is has_free_space else 0)
                for axis, size in enumerate(info.example)
            )
            for info in program.inputs
        ]
        if shapes == [info.example for info in program.inputs]:
            return
        found = propagate(program, shapes)
        if found is not None:
            yield found


def propagate(program: Program, inputs: list[tuple[int, ...]]) -> Sizes | None:
    """Return all sizes for ``inputs`` of these shapes, None where an operator does not take them."""
    given = iter(zip(inputs, program.inputs, strict=True))
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for node in program.graph.nodes:
            if node.op == "placeholder":
                shape, info = next(given)
                values[node] = torch.empty(shape, dtype=info.dtype)
            elif node.op == "get_attr":
                values[node] = mode.from_tensor(program.tensors[str(node.target)])
            elif node.op == "call_function":
                try:
                    values[node] = _call(node, lambda n: values[n])
                except Exception:  # noqa: BLE001 - an operator may reject a size in any way
                    return None
    shapes = {node: tuple(value.shape) for node, value in values.items() if isinstance(value, Tensor)}
    return Sizes(shapes, {node: value for node, value in values.items() if isinstance(value, int)})


def _call(node: fx.Node, fetch: Callable[[fx.Node], Any]) -> Any:
    assert callable(node.target)
    return node.target(*map_arg(node.args, fetch), **map_arg(node.kwargs, fetch))
