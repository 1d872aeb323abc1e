"""The graph of an exported program: every reference is to something that comes before it, every input is bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

from repconv_cli.checkpoint import pt2_schema as schema
from repconv_cli.checkpoint.program import CallArgument, CallNode, ProgramInput, ValueRef, ValueShape
from repconv_cli.checkpoint.pt2_arguments import argument, the_one
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError

if TYPE_CHECKING:
    import torch

MOST_NODES = 200_000


def inputs_of(
    graph: schema.Graph,
    signature: schema.Signature,
    tensors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, ValueShape],
) -> tuple[ProgramInput, ...]:
    """Return the graph's inputs, each bound to its tensor, in order.

    Raises:
        DamagedFileError: graph and signature list different inputs, or a tensor is missing or has another shape.
        InputError: the caller has to give something else than tensors.
    """
    inputs = tuple(_input(spec) for spec in signature.input_specs)
    if len(graph.nodes) > MOST_NODES:
        raise InputError(f"its graph has {len(graph.nodes)} calls", needed=f"at most {MOST_NODES}")
    listed_inputs = [argument(item) for item in graph.inputs]
    if len(listed_inputs) != len(inputs):
        raise DamagedFileError(f"its graph has {len(listed_inputs)} inputs and its signature {len(inputs)}")
    for item, in_graph in zip(inputs, listed_inputs, strict=True):
        if item.kind != "fixed" and in_graph != ValueRef(item.name):
            raise DamagedFileError(f"the input {quoted(item.name)} is not at its place in the graph")
        if item.kind != "fixed" and item.name not in shapes:
            raise DamagedFileError(f"the input {quoted(item.name)} has no shape")
        if item.key is not None:
            _check_bound(item, tensors, shapes[item.name])
    return inputs


def _input(spec: schema.InputSpec) -> ProgramInput:
    _, inner = the_one(spec)
    if isinstance(inner, schema.ParameterInput):
        return ProgramInput(inner.arg.name, "parameter", inner.parameter_name)
    if isinstance(inner, schema.BufferInput):
        return ProgramInput(inner.arg.name, "buffer", inner.buffer_name, inner.persistent)
    if isinstance(inner, schema.ConstantTensorInput):
        return ProgramInput(inner.arg.name, "constant", inner.tensor_constant_name)
    if isinstance(inner, schema.ConstantInput):
        return ProgramInput(inner.name, "fixed", value=argument(inner.value))
    value = argument(cast(schema.UserInput, inner).arg)
    if not isinstance(value, ValueRef):
        raise InputError(f"one of its inputs is {quoted(value)}", needed="tensors as inputs")
    return ProgramInput(value.name, "user")


def _check_bound(item: ProgramInput, tensors: Mapping[str, torch.Tensor], wanted: ValueShape) -> None:
    tensor = tensors.get(item.key or "")
    if tensor is None:
        raise DamagedFileError(f"the {item.kind} {quoted(item.key)} is not in the file")
    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != (wanted.sizes, wanted.dtype):
        raise DamagedFileError(f"the {item.kind} {quoted(item.key)} has another shape or type than in the graph")


class GraphReader:
    """Reads calls one after the other, keeping the names that are known so far."""

    def __init__(self, inputs: Iterable[ProgramInput]) -> None:
        self._known: set[str] = set()
        self._names: set[str] = set()
        for item in inputs:
            self._define(item.name)

    def node(self, node: schema.Node) -> CallNode:
        """Return one call.

        Raises:
            DamagedFileError: it uses a value that is not known yet, or defines one again.
        """
        arguments = tuple(
            CallArgument(item.name, self._checked(argument(item.arg)), item.kind == schema.KEYWORD)
            for item in node.inputs
        )
        outputs = tuple(self._output(item) for item in node.outputs)
        name = node.name or next((item for item in outputs if isinstance(item, str)), None)
        if name is None or name in self._names:
            raise DamagedFileError(f"a call of {quoted(node.target)} has no name of its own")
        self._names.add(name)
        returns_list = len(outputs) == 1 and isinstance(outputs[0], tuple)
        return CallNode(name, node.target, arguments, outputs, returns_list, node.metadata.get("nn_module_stack", ""))

    def outputs(
        self, graph: schema.Graph, signature: schema.Signature
    ) -> tuple[tuple[object, ...], dict[str, ValueRef]]:
        """Return what the caller gets, and what buffers are replaced by.

        Raises:
            DamagedFileError: graph and signature list different outputs, or one is not known.
        """
        given: list[object] = []
        updates: dict[str, ValueRef] = {}
        listed: list[object] = []
        for spec in signature.output_specs:
            _, inner = the_one(spec)
            if isinstance(inner, schema.BufferMutation):
                updates[inner.buffer_name] = ValueRef(inner.arg.name)
                listed.append(updates[inner.buffer_name])
            else:
                given.append(argument(inner.arg))
                listed.append(given[-1])
        if [self._checked(item) for item in listed] != [argument(item) for item in graph.outputs]:
            raise DamagedFileError("its graph and its signature list different outputs")
        return tuple(given), updates

    def _output(self, record: schema.Argument) -> str | tuple[str, ...] | None:
        value = argument(record)
        if value is None:
            return None
        if isinstance(value, list):
            return tuple(self._defined(item) for item in value)
        return self._defined(value)

    def _defined(self, value: object) -> str:
        if not isinstance(value, ValueRef):
            raise DamagedFileError(f"a call gives {quoted(value)}", needed="a value with a name")
        self._define(value.name)
        return value.name

    def _define(self, name: str) -> None:
        if not name.isidentifier() or name in self._known:
            raise DamagedFileError(f"its graph defines the value {quoted(name)} twice, or under an unusable name")
        self._known.add(name)

    def _checked(self, value: object) -> object:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, list):
                self._checked(item)
            elif isinstance(item, ValueRef) and item.name not in self._known:
                raise DamagedFileError(f"its graph uses the value {quoted(item.name)} before it is known")
        return value
