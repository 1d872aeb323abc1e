"""A checked torch.export program as plain data: what :mod:`repconv_cli.checkpoint.pt2` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from repconv_cli.checkpoint.shapes import SizeExpression

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ValueRef:
    """The value of that name in the graph: an input, or an output of an earlier node."""

    name: str


@dataclass(frozen=True)
class TorchConstant:
    """A value of torch by name: ``TorchConstant("dtype", "float32")`` is ``torch.float32``.

    ``kind`` is ``dtype``, ``layout``, ``memory_format`` or ``device``; for the first three, ``name`` is an
    attribute of ``torch`` from a fixed list. The device is always ``cpu``, wherever the model was exported.
    """

    kind: Literal["dtype", "layout", "memory_format", "device"]
    name: str


@dataclass(frozen=True)
class FreeSize:
    """A size that is not fixed; ``hint`` is what it was when the model was exported, if the file says so."""

    expression: SizeExpression
    hint: int | None


@dataclass(frozen=True)
class ValueShape:
    """The shape and the dtype (a name in ``torch``, such as ``float32``) of a tensor in the graph."""

    sizes: tuple[int | FreeSize, ...]
    dtype: str


@dataclass(frozen=True)
class CallArgument:
    """One argument of a call.

    Attributes:
        name: as in the operator's signature.
        value: ``None``, a ``bool``, ``int``, ``float``, ``complex`` or ``str``, a :class:`ValueRef`, a
            :class:`TorchConstant`, or a list of these (a list of lists in two rare cases).
        is_keyword: whether it is passed by name; the others come first, in order.
    """

    name: str
    value: object
    is_keyword: bool


@dataclass(frozen=True)
class CallNode:
    """One call of an operator.

    Attributes:
        name: of the node, unique in the graph.
        target: the operator as text, such as ``torch.ops.aten.conv2d.default``; not looked up, not on any list yet.
        arguments: in the order of the operator's signature.
        outputs: one entry for each value the operator returns: the name it is known by, a tuple of names where it
            returns a list of tensors, or ``None`` where it returns nothing there. A single tensor gives one name.
        returns_list: whether the operator returns one list, so that ``outputs`` is one tuple.
        module_stack: torch's ``nn_module_stack`` text: ``key,module path,class`` from the root in, joined by ``;``.
    """

    name: str
    target: str
    arguments: tuple[CallArgument, ...]
    outputs: tuple[str | tuple[str, ...] | None, ...]
    returns_list: bool
    module_stack: str

    @property
    def module_path(self) -> str:
        """Return the path of the innermost module that the call was made in; empty for the root."""
        parts = self.module_stack.rpartition(";")[2].split(",")
        return parts[1] if len(parts) == 3 and not parts[1].startswith("_empty_nn_module") else ""


@dataclass(frozen=True)
class ProgramInput:
    """One input of the graph, in order.

    Attributes:
        name: how nodes refer to it.
        kind: ``parameter``, ``buffer``, ``constant`` (a tensor in the model's code), ``user`` (a tensor that the
            caller gives) or ``fixed`` (an argument that had to be ``value`` in each call, and takes no part).
        key: the tensor's name in ``ProgramFile.tensors``; ``None`` for ``user`` and ``fixed``.
        persistent: whether a buffer belongs to the state dict.
        value: of a ``fixed`` input.
    """

    name: str
    kind: Literal["parameter", "buffer", "constant", "user", "fixed"]
    key: str | None = None
    persistent: bool = True
    value: object = None


@dataclass(frozen=True)
class ProgramFile:
    """A torch.export program whose graph has been checked for form and whose every weight byte is from the file.

    Attributes:
        inputs: every input of the graph, in order.
        nodes: every call, in order; each refers only to inputs and to calls before it.
        outputs: what the caller gets, flat, in order: references, or plain values that are always the same.
        buffer_updates: the value that a buffer would be replaced by, by buffer name (a norm in training mode).
        tensors: parameters, buffers and constants by name, on the CPU; tied ones share memory.
        shapes: of every tensor in the graph by name, as exported.
        size_values: of every size that nodes compute (``sym_size``), by name.
        ranges: smallest and largest value of each free size by its symbol; ``None`` means no limit.
        in_spec: how inputs are nested: ``{"type", "context", "children_spec"}``, the outer one being
            ``(positional arguments, keyword arguments)``. A leaf has the type ``None``.
            ``context`` is parsed JSON: for a dict its keys.
        out_spec: how outputs are nested, likewise.
        argument_names: of the model's ``forward``, where the file has them.
        torch_version: that exported it, as text.
    """

    inputs: tuple[ProgramInput, ...]
    nodes: tuple[CallNode, ...]
    outputs: tuple[object, ...]
    buffer_updates: dict[str, ValueRef]
    tensors: dict[str, torch.Tensor]
    shapes: dict[str, ValueShape]
    size_values: dict[str, int | FreeSize]
    ranges: dict[str, tuple[int | None, int | None]]
    in_spec: dict[str, object]
    out_spec: dict[str, object]
    argument_names: tuple[str, ...]
    torch_version: str

    @property
    def user_inputs(self) -> tuple[tuple[str, ValueShape], ...]:
        """Return the name and the shape of each tensor that the caller gives, in order."""
        return tuple((item.name, self.shapes[item.name]) for item in self.inputs if item.kind == "user")
