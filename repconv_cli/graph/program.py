"""``Program``: a functional graph of ATen operators, the tensors it reads, and how it is called."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from repconv_cli.errors import InputError, TraceError
from repconv_cli.graph.functional import in_place_form
from repconv_cli.graph.recurrent import AS_FUNCTIONS


@dataclass(frozen=True)
class InputInfo:
    """One tensor that the model is called with; ``shape`` has None where any size is allowed.

    ``smallest`` is the least size of each axis that the graph takes, such as that of an unpadded kernel; empty where
    there is none. ``same_as`` names for each axis an input that has the same size there, if any.
    """

    name: str
    shape: tuple[int | None, ...]
    example: tuple[int, ...]
    dtype: torch.dtype
    smallest: tuple[int, ...] = ()
    same_as: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        """Raise :class:`InputError` for a tensor of another kind or number of axes, or a size that is not taken."""
        if not isinstance(value, Tensor):
            return
        if value.ndim != len(self.shape):
            raise InputError(
                f"input {self.name} has {value.ndim} axes", needed=f"{len(self.shape)}, as when the graph was made"
            )
        if _kind(value.dtype) != _kind(self.dtype):
            raise InputError(
                f"input {self.name} is {value.dtype}", needed=f"{_kind(self.dtype)}, as when the graph was made"
            )
        for axis, (size, fixed) in enumerate(zip(value.shape, self.shape, strict=True)):
            least = self.smallest[axis] if self.smallest else 1
            if fixed is not None and size != fixed:
                raise InputError(
                    f"input {self.name}: axis {axis} has size {size}",
                    needed=f"{fixed}, the only size that this graph was made for",
                    hint="Fuse the model again at the size that it is used at: --input.",
                )
            if size < least:
                raise InputError(
                    f"input {self.name}: axis {axis} has size {size}",
                    needed=f"at least {least}",
                    hint="A smaller one does not fit the model's kernels, or takes another way through it.",
                )


def _kind(dtype: torch.dtype) -> str:
    """Return what a model may ask of a type: of one kind, another precision takes the same way through it."""
    if dtype.is_floating_point or dtype.is_complex:
        return "floating" if dtype.is_floating_point else "complex"
    return "true or false" if dtype == torch.bool else "whole numbers"


Key = str | int | float | bool
"""A key of a dict in inputs or outputs, as a file can hold it."""


def plain_key(key: object) -> Key:
    """Return a dict's key as a file can hold it: text for what is neither text nor a number."""
    return key if type(key) in (str, int, float, bool) else str(key)  # type: ignore[return-value]


@dataclass(frozen=True)
class Structure:
    """How inputs or outputs nest: a ``leaf``, a ``constant``, or a ``tuple``/``list``/``dict`` of structures."""

    kind: str
    children: tuple[Structure, ...] = ()
    keys: tuple[Key, ...] = ()
    value: Any = None

    @classmethod
    def of(cls, spec: pytree.TreeSpec) -> Structure:
        """Return torch's tree spec as a plain structure; other containers become dicts or tuples."""
        if spec.is_leaf():
            return LEAF
        children = tuple(cls.of(spec.child(index)) for index in range(spec.num_children))
        if spec.type is list:
            return cls("list", children)
        # Of a named tuple torch names the function that makes such classes.
        if spec.type is namedtuple or (isinstance(spec.type, type) and issubclass(spec.type, tuple)):
            return cls("tuple", children)
        context = spec.context
        keys = context if isinstance(context, list) else next(iter(context)) if isinstance(context, tuple) else None
        if isinstance(keys, (list, tuple)) and len(keys) == len(children):
            return cls("dict", children, tuple(plain_key(key) for key in keys))
        raise TraceError(
            f"the model takes or gives a {spec.type.__name__}", needed="tensors in tuples, lists and dicts"
        )

    def flatten(self, value: Any) -> list[Any]:
        """Return the leaves of ``value`` in order; raise :class:`InputError` where it nests differently."""
        if self.kind == "leaf":
            return [value]
        if self.kind == "constant":
            if value != self.value:
                raise InputError(f"the graph was made for the constant {self.value!r}, found {value!r}")
            return []
        if self.kind == "dict":
            if not isinstance(value, dict) or set(value) != set(self.keys):
                raise InputError(f"needed a dict with {list(self.keys)}, found {_describe(value)}")
            parts: list[Any] = [value[key] for key in self.keys]
        else:
            if not isinstance(value, (tuple, list)) or len(value) != len(self.children):
                raise InputError(f"needed {len(self.children)} values, found {_describe(value)}")
            parts = list(value)
        return [leaf for child, part in zip(self.children, parts, strict=True) for leaf in child.flatten(part)]

    def count(self) -> int:
        """Return the number of leaves."""
        return (self.kind == "leaf") + sum(child.count() for child in self.children)

    def unflatten(self, leaves: Iterator[Any]) -> Any:
        """Return the nested value whose leaves come from ``leaves``."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.value
        parts = [child.unflatten(leaves) for child in self.children]
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        return tuple(parts) if self.kind == "tuple" else parts


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with {list(value)[:8]}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return type(value).__name__


LEAF = Structure("leaf")


@dataclass(frozen=True)
class Program:
    """A graph with one ``get_attr`` node per tensor key and one ``placeholder`` per user input.

    Every ``call_function`` node that gives one tensor has ``meta`` entries ``shape`` (sizes at the traced example),
    ``free`` (which of them may vary), ``dtype`` and ``module`` (the path of the module that made it).
    The graph is functional: nothing in it writes to a tensor. ``pads_unevenly`` says that where it is written down a
    convolution pads each side by itself, so that no pad is needed before it.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    inputs: tuple[InputInfo, ...]
    arguments: Structure
    keywords: Structure
    outputs: Structure
    notes: tuple[str, ...] = field(default=())
    pads_unevenly: bool = False

    def placeholders(self) -> list[fx.Node]:
        """Return the user input nodes in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def samples(self) -> int:
        """Return how many samples the traced example holds: by this, counts are divided to be those of one."""
        return next((info.example[0] for info in self.inputs if len(info.example) > 1), 1)

    def arranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a call as the graph has it: inputs by place may be given by their names, a single one by either.

        Raises :class:`InputError` where inputs are missing, or others are given.
        """
        if len(args) == len(self.arguments.children) and kwargs.keys() == set(self.keywords.keys):
            return args, kwargs
        names = self._places()
        left = dict(kwargs)
        if not names and len(args) == len(self.keywords.keys) == 1 and not kwargs:
            return (), dict(zip(map(str, self.keywords.keys), args, strict=True))
        for name in names[len(args) :]:
            if name not in left:
                break
            args = (*args, left.pop(name))
        if len(args) != len(names) or left.keys() != set(self.keywords.keys):
            given = ", ".join([f"{len(args)} by place", *(f"{key}=" for key in left)])
            needed = [*names, *(f"{key}=" for key in self.keywords.keys)]
            raise InputError(f"called with {given}", needed=f"({', '.join(needed)})")
        return args, left

    def _places(self) -> list[str]:
        """Return the names of the inputs by place; of one that holds several, what no keyword is called."""
        infos, names = iter(self.inputs), []
        for index, child in enumerate(self.arguments.children):
            leaves = [next(infos) for _ in range(child.count())]
            names.append(leaves[0].name if child.kind == "leaf" else f"{child.kind} {index}")
        return names

    def check(self, leaves: list[Any]) -> None:
        """Raise :class:`InputError` for inputs of sizes that the graph does not hold for."""
        given = dict(zip((info.name for info in self.inputs), leaves, strict=True))
        for info in self.inputs:
            info.check(given[info.name])
            for axis, other in enumerate(info.same_as):
                if other and given[info.name].shape[axis] != given[other].shape[axis]:
                    raise InputError(
                        f"inputs {info.name} and {other}: axis {axis} has sizes {given[info.name].shape[axis]} and "
                        f"{given[other].shape[axis]}",
                        needed="the same size, as when the graph was made",
                    )

    def output_nodes(self) -> list[fx.Node]:
        """Return the nodes whose values the model gives, in order."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def dtype(self) -> torch.dtype:
        """Return the floating dtype that most weights have; float32 for a model without any."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=lambda d: counts[d]) if counts else torch.float32


def tensors_in(nested: Any) -> list[Tensor]:
    """Return the tensors in a call or in outputs, in order, however they nest."""
    return [leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor)]


def is_computation(node: fx.Node) -> bool:
    """Whether ``node`` counts as an operation: not a pick from a tuple, and not arithmetic on sizes."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not is_size(node)


def is_size(node: fx.Node) -> bool:
    """Whether ``node`` gives a size (an integer), not a tensor."""
    return bool(node.meta.get("is_size", False))


def unused_path(base: str, taken: set[str]) -> str:
    """Return ``base``, or it with the first number that makes it neither a key in ``taken`` nor on the way to one.

    >>> unused_path("a.fused", {"a.fused.weight", "a.fused2"})
    'a.fused3'
    """
    path, number = base, 1
    while any(key == path or key.startswith(f"{path}.") for key in taken):
        number += 1
        path = f"{base}{number}"
    return path


# No module path holds these; refused so that a key can never close a string in code that torch generates.
_QUOTES = set("\"'\\")


class _Holder(nn.Module):
    """A module that only holds tensors and other holders, so that keys come out as they were."""


def hold_tensors(tensors: dict[str, Tensor], parameters: frozenset[str]) -> nn.Module:
    """Return a module whose ``state_dict`` is ``tensors``: nested holders, one level per dot.

    The tensors are shared, not copied. Raises :class:`InputError` for a key that cannot be an attribute path.
    """
    root = _Holder()
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        if not all(part and part.isprintable() and not set(part) & _QUOTES for part in (*path, name)):
            raise InputError(f"tensor name {key!r} cannot be a module path")
        holder: nn.Module = root
        for part in path:
            if part not in holder._modules:
                _register(holder.add_module, part, _Holder(), key)
            holder = holder._modules[part]  # type: ignore[assignment]
        if key in parameters and (tensor.is_floating_point() or tensor.is_complex()):
            _register(holder.register_parameter, name, nn.Parameter(tensor, requires_grad=True), key)
        else:
            _register(holder.register_buffer, name, tensor, key)
    return root


def _register(method: Callable[[str, Any], None], name: str, value: Any, key: str) -> None:
    try:
        method(name, value)
    except (KeyError, TypeError) as error:
        raise InputError(f"tensor name {key!r} collides with another name", hint="Rename it.") from error


class ProgramModule(nn.Module):
    """A :class:`Program` as a module: called like the original, with the original's keys in its ``state_dict``.

    It runs without the original's class, and can be traced, exported, compiled, moved and trained further.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        root = hold_tensors(program.tensors, program.parameters)
        for name, child in root._modules.items():
            self.add_module(name, child)
        for name, parameter in root._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in root._buffers.items():
            self.register_buffer(name, buffer)
        function, keys = _as_function(program, lambda node: node.target)
        in_place, _ = _as_function(program, lambda node: in_place_form(node) or node.target)
        # Kept out of the module's attributes, whose names belong to the model.
        self.__dict__["_repconv_program"] = program
        self.__dict__["_repconv_function"] = function
        self.__dict__["_repconv_in_place"] = in_place
        self.__dict__["_repconv_places"] = [self._place(key) for key in keys]

    def _place(self, key: str) -> tuple[nn.Module, str]:
        path, _, name = key.rpartition(".")
        return self.get_submodule(path), name

    @property
    def held_program(self) -> Program:
        """The program that this module runs."""
        program: Program = self.__dict__["_repconv_program"]
        return program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, nested as the original model nests them."""
        program = self.held_program
        args, kwargs = program.arranged(args, kwargs)
        leaves = program.arguments.flatten(args) + program.keywords.flatten(kwargs)
        program.check(leaves)
        tensors = [getattr(holder, name) for holder, name in self.__dict__["_repconv_places"]]
        # What is traced stays functional: whoever compiles a graph plans its memory.
        function = self.__dict__["_repconv_function" if torch.compiler.is_compiling() else "_repconv_in_place"]
        return program.outputs.unflatten(iter(function(*tensors, *leaves)))


def _as_function(
    program: Program, operator: Callable[[fx.Node], Any]
) -> tuple[Callable[..., tuple[Any, ...]], list[str]]:
    """Return the graph as a function of (tensors by key, inputs), and the keys; each node runs as ``operator`` says.

    torch.fx writes Python for it; every name in that code is made here, none is the model's.
    """
    graph, env = fx.Graph(), {}
    tensors = [node for node in program.graph.nodes if node.op == "get_attr"]
    for index, node in enumerate(tensors):
        env[node] = graph.placeholder(f"tensor_{index}")
    for index, node in enumerate(program.placeholders()):
        env[node] = graph.placeholder(f"input_{index}")
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
            target = operator(node)
            env[node] = graph.create_node(
                "call_function", AS_FUNCTIONS.get(target, target), args, kwargs, name=f"value_{len(env)}"
            )
    graph.output(map_arg(tuple(program.output_nodes()), lambda n: env[n]))
    function: Callable[..., tuple[Any, ...]] = fx.GraphModule({}, graph, class_name="Fused").forward
    return function, [str(node.target) for node in tensors]
