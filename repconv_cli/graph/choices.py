"""Runs in which discrete choices (the top 300 queries, the largest class) are taken from another run.

Rounding moves a score by its last bit, and a choice among scores turns that into another row of the output: then two
correct models differ by as much as wrong ones do. With the same choices in both runs only rounding is left, and the
scores that were chosen among are compared like any output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.graph.interpret import run_node, to_double, walk
from repconv_cli.graph.program import Program

aten = torch.ops.aten

# What chooses, and how its value is made from the chosen indices, its scores and the axis.
_PICKS: dict[Any, Callable[[Tensor, Tensor, int], Any]] = {
    aten.topk.default: lambda scores, chosen, axis: (scores.gather(axis, chosen), chosen),
    aten.sort.default: lambda scores, chosen, axis: (scores.gather(axis, chosen), chosen),
    aten.sort.stable: lambda scores, chosen, axis: (scores.gather(axis, chosen), chosen),
    aten.argsort.default: lambda scores, chosen, axis: chosen,
    aten.argsort.stable: lambda scores, chosen, axis: chosen,
}
# Of these only the indices are a choice: a maximum is continuous.
_EXTREMES = {aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default}


def is_choice(node: fx.Node) -> bool:
    """Whether ``node`` chooses among floating scores."""
    if node.op != "call_function" or (node.target not in _PICKS and node.target not in _EXTREMES):
        return False
    if node.target in (aten.max.dim, aten.min.dim):
        return any(user.args[1] == 1 for user in node.users)
    return True


def count_choices(program: Program) -> int:
    """Return how many choices outputs may depend on."""
    return sum(is_choice(node) for node in program.graph.nodes)


@dataclass
class Run:
    """What one run gave: outputs, then the scores of each choice; and the values of the choices, in graph order."""

    outputs: list[Any] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    chosen: list[Any] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """Return all tensors that are compared."""
        return [value for value in (*self.outputs, *self.scores) if isinstance(value, Tensor)]


def run_choosing(
    program: Program, leaves: Iterable[Tensor], *, in_double: bool, chosen: list[Any] | None = None
) -> Run:
    """Return a run of ``program``, in float64 or in its own dtype, with the choices of another run where given.

    Programs match if the same choices come in the same order, as they do in a model and its fused form.
    """
    given, run = iter(leaves), Run()
    cast: Callable[[Any], Any] = to_double if in_double else lambda value: value

    def call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        value = _call(node, values, in_double)
        if is_choice(node):
            scores = values[node.args[0]]  # type: ignore[index]
            run.scores.append(scores)
            if chosen is not None:
                value = _forced(node, scores, chosen[len(run.chosen)], value)
            run.chosen.append(value)
        return value

    values = walk(program, lambda: cast(next(given)), lambda key: cast(program.tensors[key]), call)
    run.outputs = list(map_arg(program.output_nodes(), lambda n: values[n]))
    return run


def _call(node: fx.Node, values: dict[fx.Node, Any], in_double: bool) -> Any:
    if in_double:
        return run_node(node, lambda n: values[n])
    assert callable(node.target)
    return node.target(*map_arg(node.args, lambda n: values[n]), **map_arg(node.kwargs, lambda n: values[n]))


def _forced(node: fx.Node, scores: Tensor, chosen: Any, own: Any) -> Any:
    """Return the value of a choice made elsewhere, from the scores of this run."""
    if node.target in _EXTREMES:
        return (own[0], chosen[1]) if isinstance(own, tuple) else chosen
    schema = node.target._schema  # type: ignore[union-attr]
    names = {argument.name: argument.default_value for argument in schema.arguments}
    names |= dict(zip(names, node.args, strict=False)) | node.kwargs
    indices = chosen[1] if isinstance(chosen, tuple) else chosen
    return _PICKS[node.target](scores, indices, names["dim"])
