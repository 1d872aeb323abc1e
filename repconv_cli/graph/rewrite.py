"""Execute a plan: a new graph in which each block is one operator. Nothing of the old one is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry, regroup, widen
from repconv_cli.algebra.convmap import transposed_weight
from repconv_cli.errors import UnprovenError
from repconv_cli.graph.analyse import is_torch_same, symmetric_padding
from repconv_cli.graph.arrange import moves
from repconv_cli.graph.plan import Block, Plan
from repconv_cli.graph.program import Program, is_computation
from repconv_cli.graph.rules import aten
from repconv_cli.graph.terms import is_written_as_linear, moves_first, takeable_geometry

_CONVOLUTIONS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


@dataclass(frozen=True)
class Fusion:
    """A block as written into the new graph: its float64 tensors by key, and how to run it alone."""

    block: Block
    tensors: dict[str, Tensor]
    emit: Callable[[fx.Graph, fx.Node], fx.Node]


def fuse_block(block: Block) -> Fusion:
    """Return the one operator of ``block``, its kernel computed in float64, and what moves its axes into place."""
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    fusion = _operator(block)
    if term.layout is None:
        return fusion
    steps = moves(term.layout, len(anchor.shape))

    def arrange(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for target, operands in steps:
            x = graph.call_function(target, (x, *operands))
        return x

    if moves_first(term) and is_written_as_linear(term, anchor):
        return replace(fusion, emit=lambda graph, x: fusion.emit(graph, arrange(graph, x)))
    return replace(fusion, emit=lambda graph, x: arrange(graph, fusion.emit(graph, x)))


def _operator(block: Block) -> Fusion:
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    if term.keeps_values():
        return Fusion(block, {}, lambda graph, x: x)
    if term.axis is None or term.recipe is None:
        return _number(block)
    geometry = takeable_geometry(term, anchor)
    kernel = term.recipe.compute()
    kernel = regroup(widen(kernel, 0, geometry.in_channels), geometry.groups)
    if kernel.geometry != geometry:
        raise UnprovenError(f"block {block.name}: planned {geometry}, computed {kernel.geometry}")
    if term.offset.ndim > 1:
        raise UnprovenError(f"block {block.name}: its constant differs from place to place")
    bias = term.offset.expand(geometry.out_channels).contiguous()
    if not term.convolutions and geometry.is_diagonal():
        return _scale_and_shift(block, kernel.weight.flatten(), bias)
    if is_written_as_linear(term, anchor):
        return _linear(block, kernel.weight.flatten(1), bias)
    if geometry.transposed:
        return _transposed(block, kernel, bias)
    return _convolution(block, kernel, bias)


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

    return Fusion(block, {}, emit)


def _scale_and_shift(block: Block, scale: Tensor, shift: Tensor) -> Fusion:
    """One factor and one constant per channel, as one elementwise operator."""
    axis = block.choice.candidate.term.axis
    assert axis is not None
    trailing = (1,) * (len(block.anchor.meta["shape"]) - 1 - axis)
    keys = {
        f"{block.target}.weight": scale.reshape(-1, *trailing),
        f"{block.target}.bias": shift.reshape(-1, *trailing),
    }

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        weight, bias = (graph.get_attr(key) for key in keys)
        return graph.call_function(aten.addcmul.default, (bias, x, weight))

    return Fusion(block, keys, emit)


def _weight_and_bias(block: Block, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{block.target}.weight": weight.contiguous(), f"{block.target}.bias": bias}


def _linear(block: Block, weight: Tensor, bias: Tensor) -> Fusion:
    keys = _weight_and_bias(block, weight, bias)

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.linear.default, (x, *(graph.get_attr(key) for key in keys)))

    return Fusion(block, keys, emit)


def _transposed(block: Block, kernel: ConvMap, bias: Tensor) -> Fusion:
    geometry = kernel.geometry
    keys = _weight_and_bias(block, transposed_weight(kernel.weight, geometry.groups), bias)
    operator = _TRANSPOSED[len(geometry.axes)]
    options = (
        [axis.stride for axis in geometry.axes],
        [axis.low for axis in geometry.axes],
        [axis.low - axis.high for axis in geometry.axes],
        geometry.groups,
        [axis.dilation for axis in geometry.axes],
    )

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(operator, (x, *(graph.get_attr(key) for key in keys), *options))

    return Fusion(block, keys, emit)


def _convolution(block: Block, kernel: ConvMap, bias: Tensor) -> Fusion:
    geometry = kernel.geometry
    keys = _weight_and_bias(block, kernel.weight, bias)
    term, anchor = block.choice.candidate.term, block.choice.candidate.anchor
    strides, dilations = list(kernel.stride), list(kernel.dilation)
    operator = _CONVOLUTIONS[len(geometry.axes)]
    assert term.axis is not None
    has_mode = geometry.padding_mode != "zeros" and geometry.reads_outside(anchor.sizes(term.axis))
    padding = None if has_mode else symmetric_padding(term, anchor)

    def emit(graph: fx.Graph, x: fx.Node) -> fx.Node:
        weight, bias_node = (graph.get_attr(key) for key in keys)
        if padding is None and not has_mode and is_torch_same(term):
            options = (weight, bias_node, strides, "same", dilations, geometry.groups)
            return graph.call_function(operator.padding, (x, *options))
        source = x if padding is not None else _pad(graph, x, geometry)
        pads = list(padding) if padding is not None else [0] * len(strides)
        return graph.call_function(
            operator.default, (source, weight, bias_node, strides, pads, dilations, geometry.groups)
        )

    return Fusion(block, keys, emit)


def _pad(graph: fx.Graph, x: fx.Node, geometry: Geometry) -> fx.Node:
    widths = [side for axis in reversed(geometry.axes) for side in (axis.low, axis.high)]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return graph.call_function(aten.pad.default, (x, widths, mode))


def rewrite(plan: Plan, fusions: tuple[Fusion, ...]) -> Program:
    """Return the fused program; its new tensors are still float64, all others are shared with the original."""
    program = plan.program
    by_node = {fusion.block.node: fusion for fusion in fusions}
    freed = {node for fusion in fusions for node in fusion.block.freed}
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        fusion = by_node.get(node)
        if fusion is not None:
            env[node] = fusion.emit(graph, env[fusion.block.anchor])
            _describe(env[node], node, env[fusion.block.anchor])
        elif node not in freed:
            env[node] = graph.node_copy(node, lambda n: env[n])
            env[node].meta = dict(node.meta)
    graph.eliminate_dead_code()
    fused = {key: tensor for fusion in fusions for key, tensor in fusion.tensors.items()}
    read = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    tensors = {key: fused[key] if key in fused else program.tensors[key] for key in read}
    parameters = frozenset(key for key in read if key in fused or key in program.parameters)
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
