"""A :class:`Program` as JSON and back: operators by name, tensors by key, nothing that can name Python code."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor, fx

from repconv_cli.errors import InputError
from repconv_cli.graph.calls import checked_call
from repconv_cli.graph.operators import find_operator, operator_name
from repconv_cli.graph.program import InputInfo, Program, Structure

GRAPH_VERSION = 1
MAX_NODES = 100_000
MAX_DEPTH = 64

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        [
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
            "complex64",
            "complex128",
        ]
    )
}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


class StructureSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How inputs or outputs nest: see :class:`~repconv_cli.graph.program.Structure`."""

    kind: str
    children: list[StructureSpec] = []
    keys: list[str | int | float | bool] = []
    value: str | int | float | bool | None = None


class InputSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One input: ``shape`` has null where any size is allowed, ``example`` the sizes it was traced at.

    ``smallest`` has the least size of each axis, where there is one; ``same_as`` the input with the same size there.
    """

    name: str
    shape: list[int | None]
    example: list[int]
    dtype: str
    smallest: list[int] = []
    same_as: list[str] = []


class NodeSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One node. ``op`` is ``input``, ``tensor`` (with ``key``) or an operator's name; a reference is its index."""

    op: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    key: str = ""


class GraphSpec(msgspec.Struct, forbid_unknown_fields=True):
    """The whole graph. A node refers only to nodes before it, so a cycle cannot be written."""

    version: int
    inputs: list[InputSpec]
    arguments: StructureSpec
    keywords: StructureSpec
    outputs: StructureSpec
    parameters: list[str]
    nodes: list[NodeSpec]
    results: list[Any]


def to_json(program: Program) -> str:
    """Return ``program``'s graph as JSON; its tensors are named, not held.

    Raises :class:`InputError` where the model uses an operator that files may not hold.
    """
    index: dict[fx.Node, int] = {}
    nodes: list[NodeSpec] = []
    for node in program.graph.nodes:
        if node.op == "output":
            break
        index[node] = len(nodes)
        nodes.append(_node_spec(node, index))
    spec = GraphSpec(
        version=GRAPH_VERSION,
        inputs=[_input_spec(info) for info in program.inputs],
        arguments=_structure_spec(program.arguments),
        keywords=_structure_spec(program.keywords),
        outputs=_structure_spec(program.outputs),
        parameters=sorted(program.parameters & set(program.tensors)),
        nodes=nodes,
        results=[_encode(value, index) for value in program.output_nodes()],
    )
    return msgspec.json.encode(spec).decode()


def _node_spec(node: fx.Node, index: dict[fx.Node, int]) -> NodeSpec:
    if node.op == "placeholder":
        return NodeSpec("input")
    if node.op == "get_attr":
        return NodeSpec("tensor", key=str(node.target))
    return NodeSpec(
        operator_name(node.target),
        [_encode(arg, index) for arg in node.args],
        {name: _encode(arg, index) for name, arg in node.kwargs.items()},
    )


def _encode(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(item, index) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for name, table in (("dtype", _DTYPES), ("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
        for text, known in table.items():
            if type(value) is type(known) and value == known:
                return {name: text}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise InputError(f"the model uses a {type(value).__name__} as an argument, which the file format does not hold")


def _structure_spec(structure: Structure) -> StructureSpec:
    if structure.kind == "constant" and not isinstance(structure.value, (str, int, float, bool, type(None))):
        raise InputError(f"the model takes or gives a constant {type(structure.value).__name__}")
    children = [_structure_spec(child) for child in structure.children]
    return StructureSpec(structure.kind, children, list(structure.keys), structure.value)


def from_json(text: str, tensors: dict[str, Tensor]) -> Program:
    """Return the program that ``text`` describes over ``tensors``. Everything in it is checked before use.

    Raises :class:`InputError` for an unknown operator, tensor, version or structure.
    """
    try:
        spec = msgspec.json.decode(text, type=GraphSpec)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"its graph is not valid: {str(error)[:200]}") from error
    if spec.version != GRAPH_VERSION:
        raise InputError(
            f"its graph has version {spec.version}", needed=f"version {GRAPH_VERSION}", hint="Use a newer repconv."
        )
    if len(spec.nodes) > MAX_NODES:
        raise InputError(f"its graph has {len(spec.nodes):,} nodes", needed=f"at most {MAX_NODES:,}")
    graph, results = _build(spec, tensors)
    graph.output(tuple(results))
    used = {node.key for node in spec.nodes if node.op == "tensor"}
    if not set(spec.parameters) <= set(tensors):
        raise InputError("its graph lists parameters that the file does not hold")
    inputs = tuple(_input_info(entry) for entry in spec.inputs)
    axes = {info.name: len(info.shape) for info in inputs}
    if any(axis >= axes.get(name, 0) for info in inputs for axis, name in enumerate(info.same_as) if name):
        raise InputError("its graph names an input of the same size that it does not have")
    program = Program(
        graph=graph,
        tensors={key: tensor for key, tensor in tensors.items() if key in used},
        parameters=frozenset(spec.parameters),
        inputs=inputs,
        arguments=_structure(spec.arguments),
        keywords=_structure(spec.keywords),
        outputs=_structure(spec.outputs),
    )
    _check_leaves(program, len(results))
    return program


def _build(spec: GraphSpec, tensors: dict[str, Tensor]) -> tuple[fx.Graph, list[Any]]:
    graph = fx.Graph()
    built: list[fx.Node] = []
    taken = 0
    for node in spec.nodes:
        if node.op == "input":
            # A name from a file never becomes a name in generated code.
            built.append(graph.placeholder(f"input_{taken}"))
            taken += 1
        elif node.op == "tensor":
            if node.key not in tensors:
                raise InputError(f"its graph reads the tensor {node.key[:80]!r}, which the file does not hold")
            built.append(graph.get_attr(node.key))
        else:
            target = find_operator(node.op)
            args = tuple(_decode(arg, built) for arg in node.args)
            kwargs = {name: _decode(arg, built) for name, arg in node.kwargs.items()}
            built.append(checked_call(graph, target, args, kwargs))
    if taken != len(spec.inputs):
        raise InputError(f"its graph has {taken} input nodes and lists {len(spec.inputs)} inputs")
    return graph, [_decode(result, built) for result in spec.results]


def _decode(value: Any, built: list[fx.Node], depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise InputError("its graph nests arguments too deeply")
    if isinstance(value, list):
        return [_decode(item, built, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise InputError(f"its graph has an argument {str(value)[:80]!r} of unknown form")
    ((kind, content),) = value.items()
    if kind == "node":
        if not isinstance(content, int) or isinstance(content, bool) or not 0 <= content < len(built):
            shown = repr(str(content)[:40]).strip("'")
            raise InputError(f"its graph refers to node {shown}, which does not come before")
        return built[content]
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    tables: dict[str, dict[str, Any]] = {"dtype": _DTYPES, "layout": _LAYOUTS, "memory_format": _MEMORY_FORMATS}
    if kind in tables and isinstance(content, str) and content in tables[kind]:
        return tables[kind][content]
    if kind == "device" and content in ("cpu", "cuda", "mps", "xpu"):
        # Everything is read onto the CPU, wherever the model was.
        return torch.device("cpu")
    raise InputError(f"its graph has an argument {str(value)[:80]!r} of unknown form")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _input_spec(info: InputInfo) -> InputSpec:
    sizes = list(info.shape), list(info.example)
    return InputSpec(info.name, *sizes, _dtype_name(info.dtype), list(info.smallest), list(info.same_as))


def _input_info(entry: InputSpec) -> InputInfo:
    lengths = {len(entry.example), len(entry.smallest) or len(entry.shape), len(entry.same_as) or len(entry.shape)}
    if entry.dtype not in _DTYPES or lengths != {len(entry.shape)}:
        raise InputError(f"its graph's input {entry.name[:40]!r} has no usable shape and dtype")
    sizes = tuple(entry.shape), tuple(entry.example)
    return InputInfo(entry.name, *sizes, _DTYPES[entry.dtype], tuple(entry.smallest), tuple(entry.same_as))


def _structure(spec: StructureSpec, depth: int = 0) -> Structure:
    kinds = ("leaf", "constant", "tuple", "list", "dict")
    is_dict = spec.kind == "dict"
    if depth > MAX_DEPTH or spec.kind not in kinds or (is_dict and len(spec.keys) != len(spec.children)):
        raise InputError("its graph nests inputs or outputs in an unknown way")
    return Structure(
        spec.kind, tuple(_structure(child, depth + 1) for child in spec.children), tuple(spec.keys), spec.value
    )


def _check_leaves(program: Program, results: int) -> None:
    inputs = program.arguments.count() + program.keywords.count()
    if inputs != len(program.inputs) or program.outputs.count() != results:
        raise InputError("its graph's inputs or outputs do not match how it says that they nest")
    if program.arguments.kind != "tuple" or program.keywords.kind != "dict":
        raise InputError("its graph's arguments are no tuple and dict")
