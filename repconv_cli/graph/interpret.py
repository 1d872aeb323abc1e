"""Run a graph, or a part of it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.algebra.slabs import LazyWeight, Weight, is_large, slabs
from repconv_cli.allocation import return_holes
from repconv_cli.errors import NotRunnableError
from repconv_cli.graph.program import Program
from repconv_cli.graph.sizes import Sizes, other_sizes

_DOUBLED = {torch.float16, torch.bfloat16, torch.float32}
_aten = torch.ops.aten
_LAYERS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
TYPED: dict[Any, int] = {
    _aten.type_as.default: 1,
    _aten.new_full.default: 0,
    _aten.new_zeros.default: 0,
    _aten.new_ones.default: 0,
}
"""Which operand is read for its type alone."""

# Fewer channels at a time would unfold the image once for each few.
_FEWEST_ROWS = 64
_UNFOLDED_BYTES = 32 << 20
Fetch = Callable[[fx.Node], Any]
Value = TypeVar("Value")


@contextmanager
def running(what: str) -> Iterator[None]:
    """Give what an operator raises as an error in the input: shapes were checked, values and dtypes were not.

    Raises:
        NotRunnableError: an operator does not take what ``what`` hands it, or there is no memory for it.
    """
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, MemoryError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        reason = "".join(c for c in lines[0] if c.isprintable())[:200]
        raise NotRunnableError(f"{what} cannot be run ({type(error).__name__}: {reason})") from error


def to_double(value: Any) -> Any:
    """Return a floating tensor or dtype as float64, anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in _DOUBLED else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _DOUBLED else value
    return value


def run_node(node: fx.Node, fetch: Fetch) -> Any:
    """Return the value of a call in float64; ``fetch`` gives the values of the nodes it reads."""
    return_holes()
    fetched: Any = map_arg(node.args, fetch)
    if is_large_layer(node, fetched):
        x = channels_last(to_double(fetched[0]))
        (value,) = run_in_slabs(node, fetched, lambda weight, bias: (run_layer(node, x, weight, bias, *fetched[3:]),))
        return value
    args = fx.node.map_aggregate(fetched, to_double)
    kwargs = fx.node.map_aggregate(map_arg(node.kwargs, fetch), to_double)
    assert callable(node.target)
    return run_layer(node, *args) if node.target in _LAYERS and not kwargs else node.target(*args, **kwargs)


def run_layer(node: fx.Node, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """Return what a layer gives; a convolution whose image torch would unfold is a sum over some channels at a time."""
    layer: Any = node.target
    taps, positions = weight.shape[2:].numel(), x.shape[x.ndim - weight.ndim + 2 :].numel()
    unfolded = 8 * weight.shape[1:].numel() * positions
    if taps == 1 or unfolded <= _UNFOLDED_BYTES or _groups(others) > 1:
        found: Tensor = layer(x, weight, *others)
        return found
    bias, *options = others or (None,)
    count = max(1, weight.shape[1] * _UNFOLDED_BYTES // unfolded)
    parts = zip(torch.split(x, count, 1 - weight.ndim), torch.split(weight, count, 1), strict=True)
    total: Tensor = layer(*next(parts), bias, *options)
    for part in parts:
        total += layer(*part, None, *options)
    return total


def _groups(others: tuple[Any, ...]) -> int:
    """Return the groups of a layer from its arguments after the weight; those of a linear one are left out."""
    return others[4] if len(others) > 4 else 1


def is_large_layer(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether ``node``, called with ``args``, is a layer of one group whose weight is better cast piece by piece.

    Or copied, where it is laid out anew.
    """
    if node.target not in _LAYERS or node.kwargs:
        return False
    x, weight = args[:2]
    if isinstance(weight, LazyWeight):
        return True
    if x.requires_grad:
        # Its gradient reads the whole weight later on.
        return False
    return _groups(args[2:]) == 1 and is_large(weight) and (weight.ndim == 4 or weight.dtype != torch.float64)


def channels_last(x: Tensor) -> Tensor:
    """Return an image as :func:`run_in_slabs` has its kernels: for few positions that takes half the time."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def run_in_slabs(
    node: fx.Node, args: tuple[Any, ...], run: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Return what ``run`` gives for some output channels of a layer after the other, joined.

    ``run`` takes their weight, a copy for it alone, and bias in float64: the whole weight is never there in float64.
    """
    _, weight, *others = args
    bias = to_double(others[0]) if others else None
    parts = slabs(weight, _FEWEST_ROWS, channels_last=weight.ndim == 4)
    found = [run(part, None if bias is None else bias[place]) for place, part in parts]
    axis = -1 if node.target is _aten.linear.default else 1
    return tuple(torch.cat(parts, axis) for parts in zip(*found, strict=True))


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
    kinds = [n.meta["dtype"] for n in (node, *sources) if n.meta.get("dtype") in _DOUBLED | {torch.float64}]
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


def run_program(
    program: Program, inputs: Iterable[Tensor], wanted: Iterable[fx.Node] = ()
) -> tuple[list[Any], dict[fx.Node, Any]]:
    """Return (outputs, values of the ``wanted`` nodes) of the whole graph in float64."""
    kept = dict.fromkeys(wanted)
    outputs = run_side_by_side(program, [inputs], lambda key: program.tensors[key], kept)
    return outputs[0], kept


def run_side_by_side(
    program: Program,
    inputs: Iterable[Iterable[Tensor]],
    tensor_of: Callable[[str], Weight],
    kept: dict[fx.Node, Any] | None = None,
) -> list[list[Any]]:
    """Return the outputs of the whole graph in float64 for each of ``inputs``, every tensor asked for once.

    A tensor is cast when it is first read, and every value is dropped after its last use, so memory stays that of one
    forward pass. ``kept`` is filled with the values of its nodes, at the first input.
    """
    given = [iter(leaves) for leaves in inputs]

    def call(node: fx.Node, values: dict[fx.Node, list[Any]]) -> list[Any]:
        return [run_node(node, _nth(values, index)) for index in range(len(given))]

    def keep(node: fx.Node, value: list[Any]) -> None:
        if kept is not None and node in kept:
            kept[node] = value[0]

    values = walk(
        program,
        lambda: [to_double(next(leaves)) for leaves in given],
        lambda key: _repeated(tensor_of(key), len(given)),
        call,
        keep,
    )
    return [list(map_arg(program.output_nodes(), _nth(values, index))) for index in range(len(given))]


def walk(
    program: Program,
    leaf: Callable[[], Value],
    tensor: Callable[[str], Value],
    call: Callable[[fx.Node, dict[fx.Node, Value]], Value],
    seen: Callable[[fx.Node, Value], None] = lambda node, value: None,
) -> dict[fx.Node, Value]:
    """Return the values that the outputs are made of, from one walk over the graph.

    A tensor is asked for when it is first read, and every value is dropped after its last use; ``seen`` is told of
    each input's and call's value while it is there.
    """
    values: dict[fx.Node, Value] = {}
    last_use = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        for source in node.all_input_nodes:
            if source not in values:
                values[source] = tensor(str(source.target))
        if node.op == "output":
            return values
        values[node] = leaf() if node.op == "placeholder" else call(node, values)
        seen(node, values[node])
        for source in {node, *node.all_input_nodes}:
            if last_use.get(source, node) is node:
                values.pop(source, None)
    raise AssertionError("a graph ends in an output node")


def _repeated(tensor: Weight, count: int) -> list[Any]:
    """Return a tensor once for each sample, in float64; what is large is cast where it is used."""
    return [tensor if is_large(tensor) else to_double(tensor)] * count if count else []


def _nth(values: dict[fx.Node, list[Any]], index: int) -> Fetch:
    return lambda node: values[node][index]
