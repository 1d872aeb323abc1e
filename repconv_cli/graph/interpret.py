"""Run a graph, or a part of it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.algebra.slabs import LazyWeight, Weight, is_large, slabs
from repconv_cli.allocation import return_holes
from repconv_cli.errors import NotRunnableError
from repconv_cli.graph.program import Program

DOUBLED = {torch.float16, torch.bfloat16, torch.float32}
_aten = torch.ops.aten
_LAYERS = {_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.linear.default}
# These make values of numbers alone, or of numbers in the type of a tensor.
FACTORIES = {
    _aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.full.default, _aten.linspace.default,
    _aten.scalar_tensor.default,
}  # fmt: skip
FILLS = {_aten.fill.Scalar, _aten.full_like.default, _aten.new_full.default}

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
        return value.double() if value.dtype in DOUBLED else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in DOUBLED else value
    return value


def run_node(node: fx.Node, fetch: Fetch) -> Any:
    """Return the value of a call in float64; ``fetch`` gives the values of the nodes it reads."""
    return_holes()
    fetched: Any = map_arg(node.args, fetch)
    if is_large_layer(node, fetched):
        x = channels_last(to_double(fetched[0]))
        (value,) = run_in_slabs(node, fetched, lambda weight, bias: (run_layer(node, x, weight, bias, *fetched[3:]),))
        return value
    options: Any = map_arg(node.kwargs, fetch)
    assert callable(node.target)
    if node.target in FACTORIES:
        # The number that is written in the model is the one that its type holds.
        return to_double(node.target(*fetched, **options))
    args, kwargs = fx.node.map_aggregate(fetched, to_double), fx.node.map_aggregate(options, to_double)
    if node.target in FILLS and "dtype" in node.meta:
        return to_double(node.target(*args, **kwargs).to(node.meta["dtype"]))
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
