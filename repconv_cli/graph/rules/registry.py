"""What a rule is given and what it returns, and the table of rules by operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.errors import InexactError
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.term import Anchor, Leaf, Term
from repconv_cli.graph.terms import apply_leaf

aten = torch.ops.aten


@dataclass(frozen=True)
class Step:
    """The nodes whose terms a node's term is made of, and how."""

    inputs: tuple[fx.Node, ...]
    combine: Callable[[tuple[Term, ...], Anchor], Term]
    leaf: Leaf | None = None
    label: str = ""


@dataclass(frozen=True)
class Call:
    """A node to be described: its operands by position or name, and which of them are constants."""

    node: fx.Node
    constants: Constants

    @property
    def ndim(self) -> int:
        """Number of axes of the result."""
        return len(self.node.meta["shape"])

    def operand(self, index: int, name: str = "", default: Any = None) -> Any:
        """Return an operand as it stands in the graph."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def variable(self, value: Any) -> fx.Node | None:
        """Return ``value`` if it is a tensor that depends on the model's input."""
        is_variable = isinstance(value, fx.Node) and value not in self.constants and "shape" in value.meta
        return value if is_variable else None

    def is_constant(self, value: Any) -> bool:
        """Whether ``value`` is a tensor or a size that depends on parameters alone."""
        return isinstance(value, fx.Node) and value in self.constants

    def tensor(self, value: fx.Node) -> Tensor:
        """Return the float64 value of a constant tensor."""
        found: Tensor = self.constants.value(value)
        return found

    def weight(self, value: fx.Node) -> Tensor:
        """Return a constant tensor as it is stored, or in float64 where it is computed; a map casts it anyway."""
        found: Tensor = self.constants.as_stored(value)
        return found

    def number_or_tensor(self, value: Any) -> Tensor | float | None:
        """Return the value of a constant operand, None if it is none."""
        if isinstance(value, (int, float)):
            return float(value)
        if not self.is_constant(value):
            return None
        found = self.constants.value(value)
        return found if isinstance(found, Tensor) else float(found)


Rule = Callable[[Call], Step | None]
# What these make of a size is told by the shape of what they give.
SHAPED_BY_SIZES = {aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unflatten.int}
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators.

    A rule returns a :class:`Step`, None where the operator is no affine map of its inputs, or raises
    :class:`~repconv_cli.errors.InexactError` where it nearly is one, with the reason.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def reads_what_is_same_elsewhere(node: fx.Node, constants: Constants) -> bool:
    """Whether a size that is free reaches no value that ``node`` reads, but for sizes that shape what it gives."""
    return node.target in SHAPED_BY_SIZES or all(
        constants.is_same_elsewhere(source) for source in node.all_input_nodes if source in constants
    )


def describe(node: fx.Node, constants: Constants) -> Step | None:
    """Return the step of ``node``, or None where it is no affine map of one tensor."""
    found = RULES.get(node.target) if node.op == "call_function" else None
    if found is None or len(node.meta.get("shape", ())) < 2 or _is_empty(node):
        return None
    if not reads_what_is_same_elsewhere(node, constants):
        raise InexactError("a constant made of a size that is free")
    if constants.reads_fewer_digits(node):
        raise InexactError("a constant that is rounded to fewer digits than what reads it")
    step = found(Call(node, constants))
    # A cast in between would round.
    if step is None or any(s.meta.get("dtype") != node.meta["dtype"] or _is_empty(s) for s in step.inputs):
        return None
    return step


def _is_empty(node: fx.Node) -> bool:
    """Whether a tensor has no values, such as the last part of channels that were all taken before."""
    return 0 in node.meta.get("shape", ())


def leaf_step(x: fx.Node, leaf: Leaf, axis: int, label: str) -> Step:
    """Return the step of one operator that is a map itself, with the channels of its input on ``axis``."""
    return Step((x,), lambda terms, anchor: apply_leaf(leaf, terms[0], axis, anchor), leaf, label)


def integers(value: Any, dims: int) -> tuple[int, ...] | None:
    """Return one number per axis, or None where one is not known before the model runs."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, int) for v in values):
        return None
    return tuple(values * dims if len(values) == 1 else values)


def kernel_name(kernel: tuple[int, ...]) -> str:
    """Return ``3×3``."""
    return "×".join(map(str, kernel))
