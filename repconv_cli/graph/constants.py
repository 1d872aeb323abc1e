"""Values that parameters alone decide."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.graph.interpret import DOUBLED, run_node, to_double
from repconv_cli.graph.program import Program
from repconv_cli.graph.sizes import Sizes, other_sizes

_aten = torch.ops.aten
TYPED: dict[Any, int] = {
    _aten.type_as.default: 1,
    _aten.new_full.default: 0,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 0,
}
"""Which operand is read for its type alone."""


def value_inputs(node: fx.Node, without_value: Mapping[Any, int] = TYPED) -> list[fx.Node]:
    """Return the nodes whose values decide that of a call; ``without_value`` tells the operand that is not one."""
    place = without_value.get(node.target)
    typed = None if place is None else node.args[place]
    return [source for source in node.all_input_nodes if source is not typed or node.args.count(typed) > 1]


class Constants:
    """Values that depend on parameters alone, in float64, evaluated when first asked for.

    What a cast rounds is none, as weights that run in half precision.

    Sizes count as constants at their traced value, or at that of ``sizes``; :meth:`is_same_elsewhere` tells which of
    them, and of what is made of them, a rule may read.
    """

    def __init__(self, program: Program, sizes: Sizes | None = None) -> None:
        self.program = program
        self.sizes = sizes
        self.values: dict[fx.Node, Any] = {}
        self.nodes: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        for node in program.graph.nodes:
            sources = value_inputs(node) if node.op == "call_function" else []
            is_size = bool(node.meta.get("is_size"))
            is_computed = node.op == "call_function" and self.nodes.issuperset(sources) and not _rounds(node, sources)
            if is_size or is_computed or node.op == "get_attr":
                self.nodes.add(node)
            if is_size or (is_computed and not self.sized.isdisjoint(sources)):
                self.sized.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    @cached_property
    def elsewhere(self) -> tuple[Constants, ...]:
        """The same constants at other choices of the free sizes."""
        return tuple(Constants(self.program, sizes) for sizes in other_sizes(self.program))

    def is_same_elsewhere(self, node: fx.Node) -> bool:
        """Whether a constant is the same at all sizes: along an axis that grows, one value again and again.

        A number that is made of a free size is not, whatever it is at some sizes.
        """
        if node not in self.sized or not any(size is None for info in self.program.inputs for size in info.shape):
            return True
        if "shape" not in node.meta or not self.elsewhere:
            return False
        try:
            values: list[Tensor] = [constants.value(node) for constants in (self, *self.elsewhere)]
        except (RuntimeError, IndexError, ValueError):
            return False
        if any(value.ndim != values[0].ndim for value in values):
            return False
        for axis in range(values[0].ndim):
            if any(value.shape[axis] != values[0].shape[axis] for value in values):
                firsts = [value.narrow(axis, 0, 1) for value in values]
                if not all(bool((value == first).all()) for value, first in zip(values, firsts, strict=True)):
                    return False
                values = firsts
        return all(torch.equal(value, values[0]) for value in values)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor at these sizes."""
        found: tuple[int, ...] = node.meta["shape"] if self.sizes is None else self.sizes.shapes[node]
        return found

    def stored(self, node: fx.Node) -> Tensor:
        """Return the tensor that a ``get_attr`` node names, as it is stored."""
        return self.program.tensors[str(node.target)]

    def as_stored(self, node: fx.Node) -> Any:
        """Return a constant node's value, a stored tensor in the type that it is stored in."""
        return self.stored(node) if node.op == "get_attr" else self.value(node)

    def value(self, node: fx.Node) -> Any:
        """Return the float64 value of a constant node (a whole number for a size)."""
        if node.op == "get_attr":
            return to_double(self.stored(node))
        if node.meta.get("is_size"):
            return node.meta["size"] if self.sizes is None else self.sizes.values[node]
        if node not in self.values:
            for source in _unmet(node, self.values):
                self.values[source] = run_node(source, self._value_or_type)
        return self.values[node]

    def _value_or_type(self, node: fx.Node) -> Any:
        # What is no constant is read for its type.
        return self.value(node) if node in self.nodes else torch.empty(0, dtype=node.meta["dtype"])

    def forget(self) -> None:
        """Drop the values evaluated so far; they are evaluated again where asked for."""
        for constants in (self, *self.__dict__.get("elsewhere", ())):
            constants.values.clear()

    def keys(self, node: fx.Node) -> list[str]:
        """Return the tensor keys that ``node``'s value is made of."""
        found: dict[str, None] = {}
        # A constant written to step by step reads each step twice: without ``seen`` that is 2^steps walks.
        seen, stack = {node}, [node]
        while stack:
            current = stack.pop()
            if current.op == "get_attr":
                found[str(current.target)] = None
            elif not current.meta.get("is_size"):
                fresh = [source for source in value_inputs(current) if source not in seen]
                seen.update(fresh)
                stack.extend(fresh)
        return list(found)


def _rounds(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether a call gives values of fewer digits than it is given: in float64 they would be other ones."""
    kinds = [n.meta["dtype"] for n in (node, *sources) if n.meta.get("dtype") in DOUBLED | {torch.float64}]
    return node.meta.get("dtype") in kinds and any(torch.finfo(kinds[0]).eps > torch.finfo(kind).eps for kind in kinds)


def _unmet(node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
    """Return the call nodes that ``node`` needs and that have no value yet, in graph order."""
    needed: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in needed or current in known or current.op == "get_attr" or current.meta.get("is_size"):
            continue
        needed.add(current)
        stack.extend(value_inputs(current))
    return sorted(needed)


def region_between(anchor: fx.Node, node: fx.Node, constants: Constants) -> list[fx.Node]:
    """Return the nodes from ``anchor`` (without it) to ``node``, in graph order."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current is not anchor and current not in found and current not in constants:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return sorted(found)
