"""A checked ``.pt2`` program as a module that can be traced again, to make its graph functional."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from repconv_cli.checkpoint.program import CallNode, FreeSize, ProgramFile, ProgramInput, TorchConstant, ValueRef
from repconv_cli.errors import InputError
from repconv_cli.graph.calls import checked_call
from repconv_cli.graph.operators import PYTHON_OPERATORS, find_operator
from repconv_cli.graph.program import LEAF, InputInfo, Program, ProgramModule, Structure, plain_key

aten = torch.ops.aten

_PYTHON_TARGETS = {
    f"_operator.{function.__name__}": function
    for function in PYTHON_OPERATORS.values()
    if function.__module__ == "_operator"
} | {
    "math.trunc": PYTHON_OPERATORS["size.trunc"],
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
}
# These check sizes or types while exporting, and do nothing to tensors.
_DROPPED = ("aten._assert_scalar.", "aten._assert_tensor_metadata.", "aten.sym_constrain_range")


def module_of(file: ProgramFile) -> tuple[ProgramModule, tuple[str, ...]]:
    """Return (the program as a module in eval mode, notes for the report).

    Operators are looked up by name in the list of those that a graph may name, in-place forms included; arguments
    were checked when the file was read. Norms and dropout that were exported in training mode are put in eval mode.
    """
    builder = _Builder(file)
    builder.inputs()
    for node in file.nodes:
        builder.call(node)
    builder.graph.output(tuple(builder.value(value) for value in file.outputs))
    arguments, keywords = _call_structure(file.in_spec)
    program = Program(
        graph=builder.graph,
        tensors={key: file.tensors[key] for key in builder.keys},
        parameters=frozenset(item.key for item in file.inputs if item.kind == "parameter" and item.key),
        inputs=tuple(_input_info(name, shape.sizes, shape.dtype) for name, shape in file.user_inputs),
        arguments=arguments,
        keywords=keywords,
        outputs=structure_of(file.out_spec),
    )
    notes = ["sizes are as they were exported: only those exported as free may vary"]
    if builder.switched:
        notes.append(f"{builder.switched} norms or dropouts were exported in training mode; they were put in eval mode")
    return ProgramModule(program).eval(), tuple(notes)


def _call_structure(spec: Mapping[str, Any]) -> tuple[Structure, ...]:
    found = structure_of(spec).children
    if [part.kind for part in found] != ["tuple", "dict"]:
        raise InputError("the model's inputs nest in an unknown way", needed="arguments in a tuple and a dict")
    return found


def _input_info(name: str, sizes: tuple[int | FreeSize, ...], dtype: str) -> InputInfo:
    # A free size is at least 2 in the trace: 1 would be taken for a size that broadcasts.
    example = tuple(max(size.hint or 2, 2) if isinstance(size, FreeSize) else size for size in sizes)
    shape = tuple(None if isinstance(size, FreeSize) else size for size in sizes)
    return InputInfo(name, shape, example, getattr(torch, dtype))


class _Builder:
    """Builds the fx graph; names in it are made by fx, never taken from the file."""

    def __init__(self, file: ProgramFile) -> None:
        self.file = file
        self.graph = fx.Graph()
        self.values: dict[str, Any] = {}
        self.keys: list[str] = []
        self.buffers: set[str] = set()
        self.switched = 0

    def inputs(self) -> None:
        for position, item in enumerate(self.file.inputs):
            self.values[item.name] = self._input(item, position)

    def _input(self, item: ProgramInput, position: int) -> Any:
        if item.kind == "user":
            return self.graph.placeholder(f"input_{position}")
        if item.kind == "fixed":
            return item.value
        assert item.key is not None
        if item.kind == "buffer":
            self.buffers.add(item.name)
        if item.key not in self.keys:
            self.keys.append(item.key)
        return self.graph.get_attr(item.key)

    def call(self, node: CallNode) -> None:
        name = node.target.removeprefix("torch.ops.")
        if name.startswith(_DROPPED) or self._counts_batches(node, name):
            return
        target = _PYTHON_TARGETS.get(name) or find_operator(name, allow_in_place=True)
        args = [self.value(argument.value) for argument in node.arguments if not argument.is_keyword]
        kwargs = {argument.name: self.value(argument.value) for argument in node.arguments if argument.is_keyword}
        self._put_in_eval_mode(target, args, kwargs)
        self._name_outputs(node, checked_call(self.graph, target, tuple(args), kwargs))

    def _counts_batches(self, node: CallNode, name: str) -> bool:
        """Whether the call only counts training batches in a norm's buffer."""
        target = node.arguments[0].value if node.arguments else None
        return name == "aten.add_.Tensor" and isinstance(target, ValueRef) and target.name in self.buffers

    def _put_in_eval_mode(self, target: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        position = {aten.batch_norm.default: 5, aten.dropout.default: 2, aten.dropout_.default: 2}.get(target)
        if position is None:
            return
        name = "training" if position == 5 else "train"
        if len(args) > position and args[position] is True:
            args[position] = False
            self.switched += 1
        elif kwargs.get(name) is True:
            kwargs[name] = False
            self.switched += 1

    def _name_outputs(self, node: CallNode, result: fx.Node) -> None:
        names = node.outputs[0] if node.returns_list else node.outputs
        if isinstance(names, str) or names is None:
            raise InputError(f"node {node.name[:60]!r} gives its outputs in an unknown form")
        if not node.returns_list and len(names) == 1 and isinstance(names[0], str):
            self.values[names[0]] = result
            return
        for index, output in enumerate(names):
            if isinstance(output, str):
                self.values[output] = self.graph.call_function(operator.getitem, (result, index))
            elif output is not None:
                raise InputError(f"node {node.name[:60]!r} gives a list inside its outputs")

    def value(self, value: object) -> Any:
        if isinstance(value, ValueRef):
            if value.name not in self.values:
                raise InputError(f"the graph reads {value.name[:60]!r} before it is computed")
            return self.values[value.name]
        if isinstance(value, TorchConstant):
            return torch.device("cpu") if value.kind == "device" else getattr(torch, value.name)
        if isinstance(value, (list, tuple)):
            return [self.value(item) for item in value]
        return value


_KINDS = {
    "builtins.tuple": "tuple",
    "builtins.list": "list",
    "builtins.dict": "dict",
    "collections.OrderedDict": "dict",
}


def structure_of(spec: Mapping[str, Any]) -> Structure:
    """Return torch's JSON tree spec as a :class:`Structure`."""
    kind = spec.get("type")
    children = tuple(structure_of(child) for child in spec.get("children_spec") or ())
    if kind is None:
        return LEAF
    if kind not in _KINDS:
        raise InputError(f"the model takes or gives a {str(kind)[:60]}", needed="tensors in tuples, lists and dicts")
    if _KINDS[kind] != "dict":
        return Structure(_KINDS[kind], children)
    keys = spec.get("context")
    if not isinstance(keys, list) or len(keys) != len(children):
        raise InputError("the model's inputs or outputs nest in an unknown way")
    return Structure("dict", children, tuple(plain_key(key) for key in keys))
