"""Random nets as data: a list of layers, each reading earlier values, and three ways to run it.

``Net`` prints as the Python that makes it, so that a net found by chance can be kept as a test. It runs as a module
(:class:`NetModule`), and is recorded as a graph without ``torch.export``, which would take most of the time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from repconv_cli.graph.program import LEAF, InputInfo, Program, Structure

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the values that it reads (0 is the input, ``i + 1`` what layer ``i`` gives), its options.

    ``like`` is an earlier layer whose tensors it shares: that layer, called once more.
    """

    kind: str
    reads: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    like: int | None = None


@dataclass(frozen=True)
class Net:
    """Layers in order, the values given as outputs, the input's shape and the seed of every tensor."""

    shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    seed: int = 0
    is_spatial_free: bool = False

    def __str__(self) -> str:
        lines = [f"Net({self.shape}, ("]
        for index, layer in enumerate(self.layers):
            like = f", like={layer.like}" if layer.like is not None else ""
            lines.append(f"    Layer({layer.kind!r}, {layer.reads}, {layer.options}{like}),  # {index + 1}")
        return "\n".join([*lines, f"), {self.outputs}, seed={self.seed}, is_spatial_free={self.is_spatial_free})"])


# What a layer does: (machine, values read, options) -> value. A machine calls ATen operators and gives tensors.
Emit = Callable[["Machine", tuple[Any, ...], dict[str, Any]], Any]
KINDS: dict[str, Emit] = {}


def kind(function: Emit) -> Emit:
    """Register what layers of the kind ``function.__name__`` do."""
    KINDS[function.__name__] = function
    return function


class Machine:
    """Runs a net on tensors; ``tensor`` gives a tensor of the current layer, made when first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed, self.tensors = seed, {}
        self.path = ""

    tensors: dict[str, Tensor]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the ATen operator ``target`` gives."""
        return target(*args, **kwargs)

    def shape(self, value: Any) -> tuple[int, ...]:
        """Return the sizes of ``value`` as they are at the example."""
        return tuple(value.shape)

    def sizes(self, value: Any) -> list[Any]:
        """Return the sizes of ``value`` as an operator takes them: free ones are values of the graph."""
        return list(value.shape)

    def tensor(self, name: str, shape: tuple[int, ...], form: str = "normal") -> Any:
        """Return the tensor ``name`` of the current layer."""
        key = f"{self.path}.{name}"
        if key not in self.tensors:
            self.tensors[key] = _drawn(shape, form, self.seed + zlib.crc32(key.encode()))
        if tuple(self.tensors[key].shape) != shape:
            raise ValueError(f"{key} has another shape")
        return self.tensors[key]

    def run(self, net: Net, x: Any) -> tuple[Any, ...]:
        """Return the outputs of ``net`` on ``x``."""
        values = [x]
        for index, layer in enumerate(net.layers):
            values.append(self.layer(index, layer, values))
        return tuple(values[index] for index in net.outputs)

    def layer(self, index: int, layer: Layer, values: list[Any]) -> Any:
        """Return what ``layer``, the ``index``-th, gives."""
        self.path = f"{layer.kind}{index if layer.like is None else layer.like}"
        return KINDS[layer.kind](self, tuple(values[i] for i in layer.reads), layer.options)


def _drawn(shape: tuple[int, ...], form: str, seed: int) -> Tensor:
    """Return values for a weight (unit gain), a norm's gamma (some negative), a variance (one small), a factor."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    values = torch.randn(shape, generator=generator)
    if form == "weight":
        return values / max(values[0].numel(), 1) ** 0.5
    if form == "factor":
        # Exactly representable and never near zero: also divided by.
        return (values.sign() + (values == 0)) * (0.5 + torch.rand(shape, generator=generator))
    if form == "variance":
        values = 0.4 + 1.6 * torch.rand(shape, generator=generator)
        values[0] = 1e-3
    return values


class NetModule(nn.Module):
    """A net as a module: its tensors are parameters, a norm's statistics buffers."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        machine = Machine(net.seed)
        with torch.no_grad():
            machine.run(net, torch.zeros(net.shape))
        for key, value in machine.tensors.items():
            path, _, name = key.partition(".")
            if path not in self._modules:
                self.add_module(path, nn.Module())
            holder = self.get_submodule(path)
            if name in ("mean", "var"):
                holder.register_buffer(name, value)
            else:
                holder.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        machine = Machine(self.net.seed)
        machine.tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return machine.run(self.net, x)


class Recorder(Machine):
    """Writes down the graph while it runs on two examples: a size that differs between them is free."""

    def __init__(self, tensors: dict[str, Tensor], examples: tuple[Tensor, Tensor]) -> None:
        super().__init__(0)
        self.graph, self.tensors = fx.Graph(), tensors
        self.values: dict[fx.Node, tuple[Any, Any]] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.input = self._described(self.graph.placeholder("x"), examples)

    def _described(self, node: fx.Node, values: tuple[Any, Any]) -> fx.Node:
        self.values[node] = values
        first, second = values
        node.meta = {"module": self.path}
        if isinstance(first, Tensor):
            free = tuple(a != b for a, b in zip(first.shape, second.shape, strict=True))
            node.meta |= {"shape": tuple(first.shape), "free": free, "dtype": first.dtype}
        elif isinstance(first, int):
            node.meta |= {"is_size": True, "size": first}
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        values = []
        for example in (0, 1):
            run_args, run_kwargs = map_arg((args, kwargs), lambda node: self.values[node][example])  # noqa: B023
            values.append(target(*run_args, **run_kwargs))
        node = self.graph.call_function(target, args, kwargs)
        return self._described(node, (values[0], values[1]))

    def shape(self, value: fx.Node) -> tuple[int, ...]:
        found: tuple[int, ...] = value.meta["shape"]
        return found

    def sizes(self, value: fx.Node) -> list[Any]:
        free = enumerate(zip(value.meta["free"], value.meta["shape"], strict=True))
        return [self._size(value, dim) if is_free else size for dim, (is_free, size) in free]

    def _size(self, value: fx.Node, dim: int) -> fx.Node:
        """Return a free size: the input's own where it is that, as torch.export writes it."""
        sizes = [
            [tensor.shape[dim] for tensor in self.values[node] if tensor.ndim > dim] for node in (self.input, value)
        ]
        return self.call(aten.sym_size.int, self.input if sizes[0] == sizes[1] else value, dim)

    def tensor(self, name: str, shape: tuple[int, ...], form: str = "normal") -> fx.Node:
        key = f"{self.path}.{name}"
        if key not in self.nodes:
            value = super().tensor(name, shape, form)
            # All tensors stand before all calls, as an exported graph has them.
            with self.graph.inserting_before(self.input):
                self.nodes[key] = self._described(self.graph.get_attr(key), (value, value))
        return self.nodes[key]


def record(module: NetModule) -> Program:
    """Return the graph of ``module``, its batch free, and its spatial sizes where the net says so."""
    net, tensors = module.net, dict(module.state_dict())
    batch, channels, *sizes = net.shape
    # A size of 1 is never free: torch.export specialises it, since it broadcasts.
    grown = (batch + 1, channels, *(size + 4 * (net.is_spatial_free and size > 1) for size in sizes))
    with torch.no_grad():
        recorder = Recorder(tensors, (torch.ones(net.shape), torch.ones(grown)))
        outputs = recorder.run(net, recorder.input)
    recorder.graph.output(tuple(outputs))
    recorder.graph.eliminate_dead_code()
    read = {str(node.target) for node in recorder.graph.nodes if node.op == "get_attr"}
    free = recorder.input.meta["free"]
    info = InputInfo(
        "x", tuple(None if f else s for f, s in zip(free, net.shape, strict=True)), net.shape, torch.float32
    )
    return Program(
        recorder.graph,
        {key: value for key, value in tensors.items() if key in read},
        frozenset(read & dict(module.named_parameters()).keys()),
        (info,),
        Structure("tuple", (LEAF,)),
        Structure("dict"),
        Structure("tuple", (LEAF,) * len(outputs)),
    )
