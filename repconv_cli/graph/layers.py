"""The graph of a module that is made of torch's own layers, written layer by layer.

It is what :func:`repconv_cli.graph.trace.trace` gives, without torch's exporter, which takes 150 MB and some seconds
before it has done anything. Such a module depends on no size, so that all but the channels are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from repconv_cli.graph.program import LEAF, InputInfo, Program, Structure

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}
_POOLS: dict[type, tuple[int, Any]] = {
    nn.AvgPool1d: (1, aten.avg_pool1d.default),
    nn.AvgPool2d: (2, aten.avg_pool2d.default),
    nn.AvgPool3d: (3, aten.avg_pool3d.default),
}

Write = Callable[["LayerGraph", Any, fx.Node], fx.Node]
"""Writes what a module does to a node; given the graph, the module and the node."""


class LayerGraph:
    """A graph that grows by layers; ``others`` tells how modules that are not torch's are written."""

    def __init__(self, module: nn.Module, example: tuple[int, ...], others: Mapping[type[nn.Module], Write]) -> None:
        self.others = {**_WRITERS, **others}
        self.paths = {part: path for path, part in module.named_modules()}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Tensor] = {}
        own = (*module.named_parameters(), *module.named_buffers())
        self.stored = {id(t): self._described(self.graph.get_attr(key), t, is_input=False) for key, t in own}
        self.input = self._described(self.graph.placeholder("x"), torch.empty(example, device="meta"), is_input=True)

    def write(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """Return the node that gives ``module`` of ``x``."""
        for kind in type(module).__mro__:
            if kind in self.others:
                return self.others[kind](self, module, x)
        raise TypeError(f"no graph is written for a {type(module).__name__}")

    def call(self, module: nn.Module, target: Any, *args: Any) -> fx.Node:
        """Return a call of ``target`` for ``module``; a tensor that the module holds stands for itself."""
        nodes = tuple(self.stored[id(arg)] if isinstance(arg, Tensor) else arg for arg in args)
        value = target(*(self.values[arg] if isinstance(arg, fx.Node) else arg for arg in nodes))
        return self._described(self.graph.call_function(target, nodes), value, is_input=True, path=self.paths[module])

    def _described(self, node: fx.Node, value: Tensor, *, is_input: bool, path: str = "") -> fx.Node:
        self.values[node] = value.to(device="meta", dtype=torch.float64)
        free = tuple(is_input and axis != 1 for axis in range(value.ndim))
        node.meta = {"module": path, "shape": tuple(value.shape), "free": free, "dtype": torch.float64}
        return node


def program_of(
    module: nn.Module, example: tuple[int, ...], others: Mapping[type[nn.Module], Write] | None = None
) -> Program:
    """Return the program of ``module`` in eval mode on an input of shape ``example``, in float64.

    Its tensors are the module's own, in whatever type they are stored: whoever runs the program makes them float64.
    ``others`` tells how modules that are not torch's are written. Raises ``TypeError`` for one that nothing tells.
    """
    written = LayerGraph(module, example, others or {})
    graph = written.graph
    graph.output((written.write(module, written.input),))
    graph.eliminate_dead_code()
    shape = tuple(size if axis == 1 else None for axis, size in enumerate(example))
    own = dict((*module.named_parameters(), *module.named_buffers()))
    return Program(
        graph=graph,
        tensors={key: tensor.detach() for key, tensor in own.items()},
        parameters=frozenset(key for key, _ in module.named_parameters()),
        inputs=(InputInfo("x", shape, example, torch.float64),),
        arguments=Structure("tuple", (LEAF,)),
        keywords=Structure("dict"),
        outputs=LEAF,
    )


def _chain(graph: LayerGraph, parts: Iterable[nn.Module], x: fx.Node) -> fx.Node:
    for part in parts:
        x = graph.write(part, x)
    return x


def _identity(graph: LayerGraph, layer: nn.Identity, x: fx.Node) -> fx.Node:
    return x


def _linear(graph: LayerGraph, layer: nn.Linear, x: fx.Node) -> fx.Node:
    return graph.call(layer, aten.linear.default, x, layer.weight, layer.bias)


def _convolution(graph: LayerGraph, layer: _ConvNd, x: fx.Node) -> fx.Node:
    target = _CONVOLUTIONS[len(layer.kernel_size)]
    geometry = [list(sizes) for sizes in (layer.stride, layer.padding, layer.dilation)]
    return graph.call(layer, target, x, layer.weight, layer.bias, *geometry, layer.groups)


def _transposed(graph: LayerGraph, layer: _ConvTransposeNd, x: fx.Node) -> fx.Node:
    target = _TRANSPOSED[len(layer.kernel_size)]
    geometry = [list(sizes) for sizes in (layer.stride, layer.padding, layer.output_padding)]
    return graph.call(layer, target, x, layer.weight, layer.bias, *geometry, layer.groups, list(layer.dilation))


def _norm(graph: LayerGraph, norm: _BatchNorm, x: fx.Node) -> fx.Node:
    statistics = norm.running_mean, norm.running_var, False
    return graph.call(
        norm, aten.batch_norm.default, x, norm.weight, norm.bias, *statistics, norm.momentum, norm.eps, False
    )


def _pool(graph: LayerGraph, pool: Any, x: fx.Node) -> fx.Node:
    dims, target = _POOLS[type(pool)]
    sizes = ([size] * dims if isinstance(size, int) else list(size) for size in _window(pool))
    return graph.call(pool, target, x, *sizes, pool.ceil_mode, pool.count_include_pad)


def _window(pool: Any) -> tuple[Any, Any, Any]:
    return pool.kernel_size, pool.stride, pool.padding


_WRITERS: dict[type[nn.Module], Write] = {
    nn.Identity: _identity,
    nn.Sequential: _chain,
    nn.Linear: _linear,
    _ConvTransposeNd: _transposed,
    _ConvNd: _convolution,
    _BatchNorm: _norm,
    **dict.fromkeys(_POOLS, _pool),
}
