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

Sizes = tuple[int, ...]
Write = Callable[["LayerGraph", Any, fx.Node], fx.Node]
"""Writes what a module does to a node; given the graph, the module and the node."""


class LayerGraph:
    """A graph that grows by layers; ``others`` tells how modules that are not torch's are written."""

    def __init__(self, module: nn.Module, example: Sizes, others: Mapping[type[nn.Module], Write]) -> None:
        self.writers = {**_WRITERS, **others}
        self.paths = {part: path for path, part in module.named_modules()}
        self.graph = fx.Graph()
        self.own = dict((*module.named_parameters(), *module.named_buffers()))
        self.nodes = {id(tensor): self._constant(key, tensor) for key, tensor in self.own.items()}
        self.input = _described(self.graph.placeholder("x"), example, is_constant=False)

    def write(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """Return the node that gives ``module`` of ``x``."""
        for kind in type(module).__mro__:
            if kind in self.writers:
                return self.writers[kind](self, module, x)
        raise TypeError(f"no graph is written for a {type(module).__name__}")

    def call(self, module: nn.Module, target: Any, x: fx.Node, *args: Any, shape: Sizes | None = None) -> fx.Node:
        """Return a call of ``target`` for ``module``, which gives ``shape``, by default that of ``x``.

        A tensor that a module holds stands for itself.
        """
        nodes = (self.nodes[id(arg)] if isinstance(arg, Tensor) else arg for arg in args)
        called = self.graph.call_function(target, (x, *nodes))
        return _described(called, shape or x.meta["shape"], is_constant=False, path=self.paths[module])

    def _constant(self, key: str, tensor: Tensor) -> fx.Node:
        return _described(self.graph.get_attr(key), tuple(tensor.shape), is_constant=True)


def _described(node: fx.Node, shape: Sizes, *, is_constant: bool, path: str = "") -> fx.Node:
    free = tuple(not is_constant and axis != 1 for axis in range(len(shape)))
    node.meta = {"module": path, "shape": shape, "free": free, "dtype": torch.float64}
    return node


def program_of(module: nn.Module, example: Sizes, others: Mapping[type[nn.Module], Write] | None = None) -> Program:
    """Return the program of ``module`` in eval mode on an input of shape ``example``, in float64.

    Its tensors are the module's own, in whatever type they are stored: whoever runs the program makes them float64.
    ``others`` tells how modules that are not torch's are written. Raises ``TypeError`` for one that nothing tells.
    """
    written = LayerGraph(module, example, others or {})
    graph = written.graph
    graph.output((written.write(module, written.input),))
    graph.eliminate_dead_code()
    shape = tuple(size if axis == 1 else None for axis, size in enumerate(example))
    return Program(
        graph=graph,
        tensors={key: tensor.detach() for key, tensor in written.own.items()},
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
    shape = (*x.meta["shape"][:-1], layer.out_features)
    return graph.call(layer, aten.linear.default, x, layer.weight, layer.bias, shape=shape)


def _convolution(graph: LayerGraph, layer: _ConvNd, x: fx.Node) -> fx.Node:
    windows = _windows(x, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    geometry = [list(sizes) for sizes in (layer.stride, layer.padding, layer.dilation)]
    target, shape = _CONVOLUTIONS[len(windows)], (x.meta["shape"][0], layer.out_channels, *windows)
    return graph.call(layer, target, x, layer.weight, layer.bias, *geometry, layer.groups, shape=shape)


def _transposed(graph: LayerGraph, layer: _ConvTransposeNd, x: fx.Node) -> fx.Node:
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation
    sizes = tuple(
        (n - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
        for n, kernel, stride, padding, more, dilation in zip(x.meta["shape"][2:], *geometry, strict=True)
    )
    stride, padding, more, dilation = (list(sizes) for sizes in geometry[1:])
    target, shape = _TRANSPOSED[len(sizes)], (x.meta["shape"][0], layer.out_channels, *sizes)
    operands = layer.weight, layer.bias, stride, padding, more, layer.groups, dilation
    return graph.call(layer, target, x, *operands, shape=shape)


def _norm(graph: LayerGraph, norm: _BatchNorm, x: fx.Node) -> fx.Node:
    statistics = norm.running_mean, norm.running_var, False
    return graph.call(
        norm, aten.batch_norm.default, x, norm.weight, norm.bias, *statistics, norm.momentum, norm.eps, False
    )


def _pool(graph: LayerGraph, pool: Any, x: fx.Node) -> fx.Node:
    if pool.ceil_mode or not pool.count_include_pad:
        raise TypeError("no graph is written for a pool that averages fewer values at the border")
    dims, target = _POOLS[type(pool)]
    window = (pool.kernel_size, pool.stride, pool.padding)
    kernel, stride, padding = ((size,) * dims if isinstance(size, int) else tuple(size) for size in window)
    shape = (*x.meta["shape"][:2], *_windows(x, kernel, stride, padding, (1,) * dims))
    return graph.call(pool, target, x, list(kernel), list(stride), list(padding), shape=shape)


def _windows(x: fx.Node, kernel: Sizes, stride: Sizes, padding: Any, dilation: Sizes) -> Sizes:
    """Return how many windows of ``kernel`` there are along each spatial axis of ``x``."""
    axes = zip(x.meta["shape"][2:], kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * low - d * (k - 1) - 1) // s + 1 for n, k, s, low, d in axes)


_WRITERS: dict[type[nn.Module], Write] = {
    nn.Identity: _identity,
    nn.Sequential: _chain,
    nn.Linear: _linear,
    _ConvTransposeNd: _transposed,
    _ConvNd: _convolution,
    _BatchNorm: _norm,
    **dict.fromkeys(_POOLS, _pool),
}
