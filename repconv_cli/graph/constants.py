"""Values that parameters alone decide."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.graph.interpret import DOUBLED, FACTORIES, FILLS, run_node, to_double
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
MOVES = {
    operator.getitem,
    _aten.alias.default, _aten.chunk.default, _aten.detach.default, _aten.expand.default, _aten.flatten.using_ints,
    _aten.permute.default, _aten.reshape.default, _aten.select.int, _aten.slice.Tensor, _aten.split.Tensor,
    _aten.split_with_sizes.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.t.default,
    _aten.transpose.int, _aten.unbind.int, _aten.unflatten.int, _aten.unsqueeze.default,
}  # fmt: skip
"""These give the values that they get, in another order or shape."""

# What these give, a size shapes and does not otherwise touch: one number everywhere, or each value for itself.
_FILLED = {
    _aten.full.default, _aten.full_like.default, _aten.new_full.default, _aten.new_ones.default,
    _aten.new_zeros.default, _aten.ones.default, _aten.ones_like.default, _aten.zeros.default, _aten.zeros_like.default,
}  # fmt: skip
# Which operand is the number.
_WITH_VALUE = {_aten.full.default: 1, _aten.full_like.default: 1, _aten.new_full.default: 2}
_SHAPED = {_aten.broadcast_to.default, _aten.expand.default}
_ARRANGED = {
    _aten._to_copy.default, _aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.permute.default,
    _aten.to.dtype, _aten.transpose.int, _aten.unsqueeze.default,
}  # fmt: skip

# These jump where their input does not; so does all that makes whole numbers or truths of floating values.
_JUMPS = {
    _aten.ceil.default, _aten.div.Scalar_mode, _aten.div.Tensor_mode, _aten.floor.default, _aten.floor_divide.default,
    _aten.floor_divide.Scalar, _aten.fmod.Scalar, _aten.fmod.Tensor, _aten.frac.default, _aten.heaviside.default,
    _aten.remainder.Scalar, _aten.remainder.Tensor, _aten.round.decimals, _aten.round.default, _aten.sgn.default,
    _aten.sign.default, _aten.threshold.default, _aten.hardshrink.default, _aten.trunc.default,
}  # fmt: skip


def value_inputs(node: fx.Node, without_value: Mapping[Any, int] = TYPED) -> list[fx.Node]:
    """Return the nodes whose values decide that of a call; ``without_value`` tells the operand that is not one."""
    place = without_value.get(node.target)
    typed = None if place is None else node.args[place]
    return [source for source in node.all_input_nodes if source is not typed or node.args.count(typed) > 1]


class Constants:
    """Values that depend on parameters alone, in float64, evaluated when first asked for.

    What a cast rounds is none, as weights that run in half precision, and no choice is one that float64 makes another
    way than the model's own types. ``rounded`` are casts of constants, and what moves their values: they may be stored,
    but not calculated with.

    Sizes count as constants at their traced value, or at that of ``sizes``; :meth:`is_same_elsewhere` tells which of
    them, and of what is made of them, a rule may read.
    """

    def __init__(self, program: Program, sizes: Sizes | None = None) -> None:
        self.program = program
        self.sizes = sizes
        self.values: dict[fx.Node, Any] = {}
        self.nodes: set[fx.Node] = set()
        self.sized: set[fx.Node] = set()
        self.shaped: set[fx.Node] = set()
        self.rounded: set[fx.Node] = set()
        self.inexact: set[fx.Node] = set()
        self.has_free_sizes = any(size is None for info in program.inputs for size in info.shape)
        for node in program.graph.nodes:
            sources = value_inputs(node) if node.op == "call_function" else []
            is_size = bool(node.meta.get("is_size"))
            is_computed = node.op == "call_function" and self.nodes.issuperset(sources)
            is_sized = is_computed and not self.sized.isdisjoint(sources)
            is_shaped = is_sized and self._is_shaped(node, sources)
            if node.target in MOVES and not self.rounded.isdisjoint(sources):
                self.rounded.add(node)
            elif is_computed and _rounds(node, sources):
                self.rounded.add(node)
                is_computed = False
            elif is_computed and self.reads_fewer_digits(node):
                is_computed = False
            elif is_computed and _jumps(node, sources) and (is_shaped or not (is_sized and self.has_free_sizes)):
                # What has more than its shape from a free size is read by nobody.
                is_computed = self._is_same_in_own_types(node)
            if is_size or is_computed or node.op == "get_attr":
                self.nodes.add(node)
            if is_computed and not self._is_what_its_type_holds(node, sources):
                self.inexact.add(node)
            if is_size or (is_computed and is_sized):
                self.sized.add(node)
            if is_computed and is_shaped and not is_size:
                self.shaped.add(node)

    def reads_fewer_digits(self, node: fx.Node) -> bool:
        """Whether a call reads a constant that a type of fewer digits than its own has rounded.

        In float64 that constant is another number; that what reads it rounds as well is no excuse here.
        """
        return any(source in self.inexact and _digits(source) < _digits(node) for source in node.all_input_nodes)

    def _is_what_its_type_holds(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether a constant is the same number in float64: made of numbers alone, or only moved or cast."""
        if node.target in FACTORIES | FILLS | _FILLED or not _digits(node):
            return True
        return node.target in MOVES | _SHAPED | _ARRANGED and self.inexact.isdisjoint(sources)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether no input reaches a value: a constant, or what a cast makes of one."""
        return node in self.nodes or node in self.rounded

    @cached_property
    def elsewhere(self) -> tuple[Constants, ...]:
        """The same constants at other choices of the free sizes."""
        found = []
        for sizes in other_sizes(self.program):
            found.append(copy(self))
            found[-1].sizes, found[-1].values = sizes, {}
        return tuple(found)

    def is_same_elsewhere(self, node: fx.Node) -> bool:
        """Whether a constant is the same at all sizes: along an axis that grows, one value again and again.

        What a free size is more than the shape of is not, whatever it is at some sizes: it may change at the next.
        """
        if node not in self.sized or not self.has_free_sizes:
            return True
        if node not in self.shaped or not self.elsewhere:
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
        return self.value(node) if self.is_fixed(node) else torch.empty(0, dtype=node.meta["dtype"])

    def _is_shaped(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether sizes decide no more than the shape of what a call gives."""
        if node.target in _FILLED:
            place = _WITH_VALUE.get(node.target, len(node.args))
            value = node.args[place] if len(node.args) > place else node.kwargs.get("fill_value")
            return not isinstance(value, fx.Node)
        tensors = [source for source in sources if not source.meta.get("is_size")]
        if any(source in self.sized and source not in self.shaped for source in tensors):
            return False
        if node.target in _SHAPED:
            return True
        is_by_itself = node.target in _ARRANGED or torch.Tag.pointwise in getattr(node.target, "tags", ())
        return is_by_itself and len(tensors) == len(sources)

    def _is_same_in_own_types(self, node: fx.Node) -> bool:
        """Whether a call gives in the model's types what it gives in float64. No value is kept."""
        own: dict[fx.Node, Any] = {}

        def fetch(source: fx.Node) -> Any:
            if source in own:
                return own[source]
            is_given = source.op == "get_attr" or source.meta.get("is_size")
            return self.as_stored(source) if is_given else self._value_or_type(source)

        try:
            for source in _unmet(node, own):
                assert callable(source.target)
                own[source] = source.target(*map_arg(source.args, fetch), **map_arg(source.kwargs, fetch))
            return _is_same(own[node], self.value(node))
        except (RuntimeError, IndexError, ValueError):
            return False
        finally:
            self.values.clear()

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
    return 0 < _digits(node) < max(map(_digits, sources), default=0)


def _digits(node: fx.Node) -> int:
    """Return how many bits a floating value has, 0 for any other."""
    dtype = node.meta.get("dtype")
    return -math.frexp(torch.finfo(dtype).eps)[1] if dtype in DOUBLED | {torch.float64} else 0


def _jumps(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Whether a call may make much of a small difference between the floating values that it is given."""
    return (node.target in _JUMPS or not _is_floating(node)) and any(map(_is_floating, sources))


def _is_floating(node: fx.Node) -> bool:
    """Whether a value has digits that its type cuts off; a part of several values does not tell."""
    dtype = node.meta.get("dtype")
    return not node.meta.get("is_size") and (dtype is None or dtype.is_floating_point or dtype.is_complex)


def _is_same(own: Any, value: Any) -> bool:
    """Whether a step that jumps came out the same: what it made of digits that differ may differ as they do."""
    if not isinstance(own, Tensor) or not own.is_floating_point():
        return torch.equal(own, value) if isinstance(own, Tensor) else bool(own == value)
    known = value[value.isfinite()].abs()
    limit = torch.finfo(own.dtype).eps ** 0.5 * (float(known.max()) if known.numel() else 0.0)
    return torch.allclose(own.double(), value, rtol=0, atol=limit, equal_nan=True)


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
