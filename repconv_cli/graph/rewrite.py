"""Execute a plan: a new graph in which each block is one operator. Nothing of the old one is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry
from repconv_cli.algebra.convmap import transposed_weight
from repconv_cli.algebra.operations import reading
from repconv_cli.algebra.slabs import Weight
from repconv_cli.errors import UnprovenError
from repconv_cli.graph.plan import Block, Plan
from repconv_cli.graph.program import Program, is_computation
from repconv_cli.graph.recipe import Sum, compute, compute_lazily
from repconv_cli.graph.rules import aten
from repconv_cli.graph.unroll import Unrolled
from repconv_cli.graph.written import (
    is_torch_same,
    is_written_as_linear,
    moves_after,
    moves_first,
    symmetric_padding,
    takeable_geometry,
    written_geometry,
)

_CONVOLUTIONS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


Emit = Callable[[fx.Graph, fx.Node], fx.Node]


@dataclass(frozen=True)
class Fusion:
    """A block as written into the new graph: its operators, the keys of its tensors, and how to compute these.

    ``compute`` returns float64 tensors in the order of ``keys``; it costs as much as the block is large, but for a
    weight that is lazy.
    """

    block: Block
    emit: Emit
    keys: tuple[str, ...] = ()
    compute: Callable[[], tuple[Weight, ...]] = tuple

    def tensors(self) -> dict[str, Weight]:
        """Return the new tensors by key, computed in float64."""
        return dict(zip(self.keys, self.compute(), strict=True))


def fuse_block(block: Block) -> Fusion:
    """Return the one operator of ``block``, and what moves its axes into place. No kernel is computed."""
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    fusion = _operator(block)
    if isinstance(term, Unrolled):
        return _on_rows(fusion, term)
    steps = moves_after(term, anchor)
    if not steps:
        return fusion

    def arrange(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for target, operands in steps:
            x = graph.call_function(target, (x, *operands))
        return x

    if moves_first(term) and is_written_as_linear(term, anchor):
        return replace(fusion, emit=lambda graph, x: fusion.emit(graph, arrange(graph, x)))
    return replace(fusion, emit=lambda graph, x: arrange(graph, fusion.emit(graph, x)))


def _on_rows(fusion: Fusion, term: Unrolled) -> Fusion:
    """Return ``fusion`` between the reshapes to rows and back."""

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for shape, run in ((term.before, fusion.emit), (term.after, lambda _, y: y)):
            if shape is not None:
                x = graph.call_function(aten.reshape.default, (x, list(shape)))
            x = run(graph, x)
        return x

    return replace(fusion, emit=emit)


def _operator(block: Block) -> Fusion:
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    if term.keeps_values():
        return Fusion(block, lambda graph, x: x)
    if term.axis is None or term.recipe is None:
        return _number(block)
    geometry = written_geometry(term, anchor)
    if not term.convolutions and geometry.is_diagonal():
        return _scale_and_shift(block)
    if is_written_as_linear(term, anchor):
        return _linear(block)
    return _transposed(block, geometry) if geometry.transposed else _convolution(block, geometry)


def _kernel(block: Block) -> tuple[ConvMap, Tensor]:
    """Return the block's kernel on its whole anchor and its bias, float64."""
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    geometry = takeable_geometry(term, anchor)
    assert term.recipe is not None
    kernel = compute(term.recipe)
    kernel = reading(kernel, geometry)
    if kernel.geometry != geometry:
        raise UnprovenError(f"block {block.name}: planned {geometry}, computed {kernel.geometry}")
    return kernel, _bias(block, kernel.bias)


def _bias(block: Block, bias: Tensor) -> Tensor:
    offset = block.choice.candidate.term.offset
    if offset.ndim > 1:
        raise UnprovenError(f"block {block.name}: its constant differs from place to place")
    return (offset.expand(len(bias)) + bias).contiguous()


def _weight_and_bias(block: Block) -> tuple[Weight, Tensor]:
    """Return what a layer of ``block`` has, float64; a large weight is lazy if it can be."""
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    if isinstance(term.recipe, Sum) and term.recipe.geometry == takeable_geometry(term, anchor):
        lazy = compute_lazily(term.recipe)
        if lazy is not None:
            return lazy[0], _bias(block, lazy[1])
    kernel, bias = _kernel(block)
    return kernel.weight.contiguous(), bias


def _number(block: Block) -> Fusion:
    """One factor for every channel."""
    term = block.choice.candidate.term
    factor, shift = term.factor, float(term.offset)

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        if factor == 1.0:
            return graph.call_function(aten.add.Tensor, (x, shift))
        if shift == 0.0:
            return graph.call_function(aten.mul.Tensor, (x, factor))
        return graph.call_function(aten.add.Tensor, (shift, x), {"alpha": factor})

    return Fusion(block, emit)


def _keys(block: Block) -> tuple[str, str]:
    return f"{block.target}.weight", f"{block.target}.bias"


def _scale_and_shift(block: Block) -> Fusion:
    """One factor and one constant per channel, as one elementwise operator, without what is neutral."""
    weight, bias = _keys(block)

    def compute() -> tuple[Tensor, ...]:
        kernel, constant = _kernel(block)
        found = {weight: kernel.weight, bias: constant}
        return tuple(found[key].reshape(shape) for key, shape in block.tensors.items())

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        stored = {key: graph.get_attr(key) for key in block.tensors}
        if len(stored) == 2:
            return graph.call_function(aten.addcmul.default, (stored[bias], x, stored[weight]))
        operators = {weight: aten.mul.Tensor, bias: aten.add.Tensor}
        for key, operand in stored.items():
            x = graph.call_function(operators[key], (x, operand))
        return x

    return Fusion(block, emit, tuple(block.tensors), compute)


def _linear(block: Block) -> Fusion:
    keys = _keys(block)

    def compute() -> tuple[Tensor, Tensor]:
        kernel, bias = _kernel(block)
        return kernel.weight.flatten(1), bias

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.linear.default, (x, *(graph.get_attr(key) for key in keys)))

    return Fusion(block, emit, keys, compute)


def _transposed(block: Block, geometry: Geometry) -> Fusion:
    keys = _keys(block)
    operator, axes = _TRANSPOSED[len(geometry.axes)], tuple(range(2, 2 + len(geometry.axes)))
    options = (
        [axis.stride for axis in geometry.axes],
        [axis.low for axis in geometry.axes],
        [axis.low - axis.high for axis in geometry.axes],
        geometry.groups,
        [axis.dilation for axis in geometry.axes],
    )

    def compute() -> tuple[Tensor, Tensor]:
        kernel, bias = _kernel(block)
        # A plain one with stride 1 reads its kernel the other way around.
        weight = kernel.weight if kernel.geometry.transposed else kernel.weight.flip(axes)
        return transposed_weight(weight, geometry.groups), bias

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(operator, (x, *(graph.get_attr(key) for key in keys), *options))

    return Fusion(block, emit, keys, compute)


def _convolution(block: Block, geometry: Geometry) -> Fusion:
    keys = _keys(block)
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    strides, dilations = [axis.stride for axis in geometry.axes], [axis.dilation for axis in geometry.axes]
    operator = _CONVOLUTIONS[len(geometry.axes)]
    assert term.axis is not None
    has_mode = geometry.padding_mode != "zeros" and geometry.reads_outside(anchor.sizes(term.axis))
    padding = None if has_mode else symmetric_padding(term, anchor)

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        weight, bias = (graph.get_attr(key) for key in keys)
        if padding is None and not has_mode and is_torch_same(term):
            return graph.call_function(operator.padding, (x, weight, bias, strides, "same", dilations, geometry.groups))
        source = x if padding is not None else _pad(graph, x, geometry)
        pads = list(padding) if padding is not None else [0] * len(strides)
        return graph.call_function(operator.default, (source, weight, bias, strides, pads, dilations, geometry.groups))

    return Fusion(block, emit, keys, partial(_weight_and_bias, block))


def _pad(graph: fx.Graph, x: fx.Node, geometry: Geometry) -> fx.Node:
    widths = [side for axis in reversed(geometry.axes) for side in (axis.low, axis.high)]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return graph.call_function(aten.pad.default, (x, widths, mode))


def rewrite(plan: Plan, fusions: tuple[Fusion, ...]) -> Program:
    """Return the fused program without its new tensors; all others are shared with the original."""
    program = plan.program
    by_node = {fusion.block.node: fusion for fusion in fusions}
    freed = {node for fusion in fusions for node in fusion.block.freed}
    stored = {lifted.node: lifted.key for lifted in plan.lifted}
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        fusion = by_node.get(node)
        if fusion is not None:
            env[node] = fusion.emit(graph, env[fusion.block.anchor])
            _describe(env[node], node, env[fusion.block.anchor])
        elif node in stored:
            env[node] = graph.get_attr(stored[node])
            env[node].meta = dict(node.meta)
        elif node not in freed:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    graph.eliminate_dead_code()
    made = {key for fusion in fusions for key in fusion.keys}
    made |= set(stored.values())
    read = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    tensors = {key: program.tensors[key] for key in read if key not in made}
    fixed = {lifted.key for lifted in plan.lifted if program.parameters.isdisjoint(lifted.sources)}
    parameters = frozenset(key for key in read if key in made - fixed or key in program.parameters)
    return replace(program, graph=graph, tensors=tensors, parameters=parameters)


def _describe(new: fx.Node, old: fx.Node, anchor: fx.Node) -> None:
    """Give the operators that a block became its module; only the last one's value is the block's."""
    if new is anchor:
        return
    new.meta = dict(old.meta)
    stack = list(new.all_input_nodes)
    while stack:
        source = stack.pop()
        if source is not anchor and is_computation(source) and not source.meta:
            source.meta = {"module": old.meta.get("module", ""), "dtype": old.meta["dtype"]}
            stack.extend(source.all_input_nodes)
