"""A batch that a trace fixed made free: traced at another one, and proven to be the same graph at the fixed one.

Some models tell the batch that they saw last from all others, as heads do that keep their anchors for it. torch then
ties the trace to that batch, or away from it, though the model computes the same for every batch. So the model is
traced at a batch that is not special. If torch says of that graph that it holds for all batches but the special ones,
what is left to know is what the model does there: it is traced there too, and the two graphs are compared, operator by
operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from repconv_cli.graph.constants import TYPED, Constants, value_inputs
from repconv_cli.graph.kept import in_eval_mode, quiet
from repconv_cli.graph.program import InputInfo, Program, ProgramModule, tensors_in
from repconv_cli.graph.sizes import Sizes, other_size, propagate

aten = torch.ops.aten
# Which operand is read for its type and its shape alone.
_SHAPED: dict[Any, int] = {
    **TYPED,
    aten.expand_as.default: 1,
    aten.full_like.default: 0,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 0,
}

# Each special batch costs a trace, and what is computed of it alone is computed.
MOST_SPECIAL = 4
MOST_SAMPLES = 1024


@contextmanager
def lengths_are_sizes(module: nn.Module) -> Iterator[None]:
    """Let ``len`` of a traced tensor be its first size as it is: Python would make a number of it, which fixes it.

    So it is in the files of the module's own classes, while the block runs. For all else, and for a tensor that is not
    traced, it gives what it always gives.
    """
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    files = [vars(sys.modules[name]) for name in {kind.__module__ for kind in classes} if _is_users(name)]
    changed = [names for names in files if "len" not in names]
    for names in changed:
        names["len"] = _length_or_size
    try:
        yield
    finally:
        for names in changed:
            names.pop("len", None)


def _length_or_size(of: Any, /) -> Any:
    return of.shape[0] if isinstance(of, Tensor) and of.ndim else len(of)


def _is_users(name: str) -> bool:
    """Whether a Python module is none of Python's, torch's or ours."""
    return name in sys.modules and name.partition(".")[0] not in {*sys.stdlib_module_names, "torch", "repconv_cli"}


@dataclass(frozen=True)
class Call:
    """A call with tensors of one ``batch``."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return the call; None if its tensors do not have the first size in common."""
        batches = {leaf.shape[0] if leaf.ndim else None for leaf in tensors_in((args, kwargs))}
        batch = batches.pop() if len(batches) == 1 else None
        return None if batch is None else cls(batch, args, kwargs)

    def of_batch(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with ``batch`` samples: the first ones, or where there are less, any numbers.

        A trace reads none of them, and what is not written to takes no memory.
        """

        def resized(leaf: Tensor) -> Tensor:
            return leaf[:batch] if batch <= self.batch else leaf.new_empty(batch, *leaf.shape[1:])

        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, resized, (self.args, self.kwargs))
        return found


def is_same_at(batch: int, free: Program, fixed: Program) -> bool:
    """Whether ``free``, given ``batch`` samples, is the graph ``fixed``: the same operators on the same operands.

    What does not depend on the values of the inputs is one operand: it may be computed in one and stored in the other,
    and is compared by value, bit by bit.
    """
    sizes = propagate(free, [(batch, *info.example[1:]) for info in free.inputs])
    if sizes is None or [info.name for info in free.inputs] != [info.name for info in fixed.inputs]:
        return False
    return _Comparison(_Known(free, sizes), _Known(fixed)).run()


def is_same_for_one(program: Program, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``program`` gives for the first sample alone of a call what ``module`` does, as both are run.

    torch takes every size that it frees for more than one, and so says nothing of a batch of one. Inputs whose batches
    may differ are also given one sample each alone, and free sizes are others too: a model may take one sample another
    way only where it is small. Where the batch is not free, or the module does not take a single sample, there is
    nothing to compare.
    """
    batches: dict[str, list[int]] = {}
    for index, info in enumerate(program.inputs):
        if info.shape and info.shape[0] is None:
            batches.setdefault(info.same_as[0] if info.same_as and info.same_as[0] else info.name, []).append(index)
    groups = list(batches.values())
    alone = groups if len(groups) > 1 else []
    every = [index for group in groups for index in group]
    if not every:
        return True
    given = [tuple(leaf.shape) for leaf in tensors_in((args, kwargs))]
    shapes = [given]
    if any(size is None for info in program.inputs for size in info.shape[1:]):
        shapes += [_shapes(program, given, _smallest), _shapes(program, given, other_size)]
    calls = [(shapes[0], of_one) for of_one in alone] + [(sizes, every) for sizes in shapes]
    traced = ProgramModule(program)
    return all(_is_same_of_one(traced, module, args, kwargs, *call) for call in calls)


def _smallest(info: InputInfo, axis: int) -> int:
    return info.smallest[axis] if info.smallest else 1


def _shapes(
    program: Program, given: list[tuple[int, ...]], choose: Callable[[InputInfo, int], int]
) -> list[tuple[int, ...]]:
    """Return the shapes of the inputs with another size on each axis in space that is free."""
    return [
        tuple(choose(info, axis) if axis and info.shape[axis] is None else size for axis, size in enumerate(shape))
        for info, shape in zip(program.inputs, given, strict=True)
    ]


def _is_same_of_one(
    traced: ProgramModule,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: list[tuple[int, ...]],
    of_one: list[int],
) -> bool:
    """Compare a call with inputs of these ``shapes``, those ``of_one``, by their place, with one sample alone."""
    places = iter(range(len(shapes)))

    def resized(leaf: Tensor) -> Tensor:
        place = next(places)
        for axis, size in enumerate(shapes[place]):
            if size != leaf.shape[axis]:
                # The values that are there, again where more are needed: any are such as the model takes.
                leaf = leaf.index_select(axis, torch.arange(size) % leaf.shape[axis])
        return leaf[:1] if place in of_one else leaf

    args, kwargs = pytree.tree_map_only(Tensor, resized, (args, kwargs))
    with in_eval_mode(module), torch.no_grad(), quiet():
        try:
            expected = tensors_in(module(*args, **kwargs))
        except Exception:  # noqa: BLE001 - the user's forward may raise anything
            return True
        try:
            found = tensors_in(traced(*args, **kwargs))
        except Exception:  # noqa: BLE001 - an operator may reject what it is given in any way
            return False
    return len(found) == len(expected) and all(map(_is_alike, found, expected))


def _is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by no more than the order of the operations in a kernel may make them."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other.detach()[other.isfinite()].abs()
    limit = torch.finfo(one.dtype).eps ** 0.5 * (float(finite.max()) if finite.numel() else 0.0)
    return torch.allclose(one, other, rtol=0, atol=limit, equal_nan=True)


class _Known(dict[fx.Node, Any]):
    """What a graph computes without its inputs' values, by node, in the types that the model has."""

    def __init__(self, program: Program, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.outputs = program.output_nodes()
        constants = Constants(program, sizes)
        for node in program.graph.nodes:
            if node.op == "get_attr" or node.meta.get("is_size"):
                self[node] = constants.as_stored(node)
            elif node.op == "call_function" and all(source in self for source in value_inputs(node, _SHAPED)):
                self[node] = self._run(node, constants)

    def __contains__(self, operand: object) -> bool:
        return not isinstance(operand, fx.Node) or super().__contains__(operand)

    def value(self, operand: Any) -> Any:
        """Return the value of an operand."""
        return map_arg(operand, lambda node: self[node])

    def _run(self, node: fx.Node, constants: Constants) -> Any:
        def fetch(source: fx.Node) -> Any:
            if source in self:
                return self[source]
            return torch.empty((), dtype=source.meta["dtype"]).expand(constants.shape(source))

        assert callable(node.target)
        return node.target(*map_arg(node.args, fetch), **map_arg(node.kwargs, fetch))


class _Comparison:
    """Two graphs walked together, from their outputs to their inputs."""

    def __init__(self, one: _Known, other: _Known) -> None:
        self.one, self.other = one, other

    def run(self) -> bool:
        """Whether all outputs are the same functions of the inputs."""
        pairs: list[tuple[Any, Any]] = [(self.one.outputs, self.other.outputs)]
        seen: set[tuple[fx.Node, fx.Node]] = set()
        while pairs:
            one, other = pairs.pop()
            if isinstance(one, fx.Node) and isinstance(other, fx.Node):
                if (one, other) in seen:
                    continue
                seen.add((one, other))
            operands = self._operands(one, other)
            if operands is None:
                return False
            pairs.extend(operands)
        return True

    def _operands(self, one: Any, other: Any) -> list[tuple[Any, Any]] | None:
        """Return what must be the same for ``one`` and ``other`` to be; None if they are not whatever that is."""
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return list(zip(one, other, strict=True)) if len(one) == len(other) else None
        if one in self.one and other in self.other:
            return [] if _is_equal(self.one.value(one), self.other.value(other)) else None
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
            return None
        if (one.op, one.target) != (other.op, other.target) or one.kwargs.keys() != other.kwargs.keys():
            return None
        return [(one.args, other.args), *((one.kwargs[key], other.kwargs[key]) for key in one.kwargs)]


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
