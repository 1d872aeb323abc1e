"""The JSON of a torch.export program, as strict types: a field that is not listed here is refused by name.

Only what a graph of tensor operations uses is listed. Sub-graphs, custom objects and tokens are left out on purpose.
Numbers in ``dtype``, ``layout`` and ``kind`` are torch's own enumerations.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

MAJOR_VERSION = 8
"""The schema's major version; a change of it is a change of meaning."""

DTYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 34: "uint32", 35: "uint64",
}  # fmt: skip
LAYOUTS = {7: "strided"}
MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}

KEYWORD = 2
"""The ``kind`` of an argument that is passed by its name."""

Number = float | Literal["Infinity", "-Infinity", "NaN"]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Anything in the file: immutable, and with no field that is not declared."""


class Named(Record, frozen=True):
    """A reference to a tensor of the graph."""

    name: str


class Hint(Record, frozen=True):
    """The value that a symbolic size had at export."""

    as_int: int | None = None
    as_bool: bool | None = None
    as_float: Number | None = None


class Expression(Record, frozen=True):
    """A symbolic size, as text."""

    expr_str: str
    hint: Hint | None = None


class SymInt(Record, frozen=True):
    """A size: a number, or an expression. Exactly one is set."""

    as_int: int | None = None
    as_expr: Expression | None = None


class SymValue(Record, frozen=True):
    """A number, truth value or expression of the graph that is not a size. It is carried, not used."""

    as_bool: bool | None = None
    as_float: Number | None = None
    as_expr: Expression | None = None


class Device(Record, frozen=True):
    """Where a tensor was; it is ignored, everything is read onto the CPU."""

    type: str
    index: int | None = None


class TensorMeta(Record, frozen=True):
    """The type and the geometry of a tensor; strides and offset count elements."""

    dtype: int
    sizes: list[SymInt]
    requires_grad: bool
    device: Device
    strides: list[SymInt]
    storage_offset: SymInt
    layout: int


class SymArgument(Record, frozen=True):
    """A number, or the name of a value of the graph that is one."""

    as_name: str | None = None
    as_int: int | None = None
    as_float: Number | None = None
    as_bool: bool | None = None


class OptionalTensor(Record, frozen=True):
    """A tensor or nothing."""

    as_tensor: Named | None = None
    as_none: bool | None = None


class Complex(Record, frozen=True):
    """A complex number."""

    real: Number
    imag: Number


class Argument(Record, frozen=True):
    """A value in a call: exactly one field is set."""

    as_none: bool | None = None
    as_tensor: Named | None = None
    as_tensors: list[Named] | None = None
    as_int: int | None = None
    as_ints: list[int] | None = None
    as_float: Number | None = None
    as_floats: list[Number] | None = None
    as_string: str | None = None
    as_strings: list[str] | None = None
    as_sym_int: SymArgument | None = None
    as_sym_ints: list[SymArgument] | None = None
    as_sym_float: SymArgument | None = None
    as_sym_floats: list[SymArgument] | None = None
    as_sym_bool: SymArgument | None = None
    as_sym_bools: list[SymArgument] | None = None
    as_scalar_type: int | None = None
    as_memory_format: int | None = None
    as_layout: int | None = None
    as_device: Device | None = None
    as_bool: bool | None = None
    as_bools: list[bool] | None = None
    as_optional_tensor: OptionalTensor | None = None
    as_optional_tensors: list[OptionalTensor] | None = None
    as_complex: Complex | None = None
    as_int_lists: list[list[int]] | None = None
    as_nested_tensors: list[list[Named]] | None = None


class NamedArgument(Record, frozen=True):
    """An argument of an operator, by its name in the operator's signature."""

    name: str
    arg: Argument
    kind: int | None = None


class Node(Record, frozen=True):
    """A call of an operator."""

    target: str
    inputs: list[NamedArgument]
    outputs: list[Argument]
    metadata: dict[str, str]
    is_hop_single_tensor_return: bool | None = None
    name: str | None = None


class Graph(Record, frozen=True):
    """The calls in order, and the geometry of every value."""

    inputs: list[Argument]
    outputs: list[Argument]
    nodes: list[Node]
    tensor_values: dict[str, TensorMeta]
    sym_int_values: dict[str, SymInt]
    sym_bool_values: dict[str, SymValue]
    is_single_tensor_return: bool = False
    custom_obj_values: dict[str, Any] = {}
    sym_float_values: dict[str, SymValue] = {}


class UserInput(Record, frozen=True):
    """An input that the caller gives."""

    arg: Argument


class ParameterInput(Record, frozen=True):
    """An input that is a parameter."""

    arg: Named
    parameter_name: str


class BufferInput(Record, frozen=True):
    """An input that is a buffer."""

    arg: Named
    buffer_name: str
    persistent: bool


class ConstantTensorInput(Record, frozen=True):
    """An input that is a tensor written in the model's code."""

    arg: Named
    tensor_constant_name: str


class ConstantInput(Record, frozen=True):
    """An input that had to be the same value in each call, such as ``None`` or a flag."""

    name: str
    value: Argument


class InputSpec(Record, frozen=True):
    """What an input of the graph is: exactly one field is set."""

    user_input: UserInput | None = None
    parameter: ParameterInput | None = None
    buffer: BufferInput | None = None
    tensor_constant: ConstantTensorInput | None = None
    constant_input: ConstantInput | None = None


class UserOutput(Record, frozen=True):
    """An output that the caller gets."""

    arg: Argument


class BufferMutation(Record, frozen=True):
    """An output that replaces a buffer."""

    arg: Named
    buffer_name: str


class OutputSpec(Record, frozen=True):
    """What an output of the graph is: exactly one field is set."""

    user_output: UserOutput | None = None
    buffer_mutation: BufferMutation | None = None


class Signature(Record, frozen=True):
    """What the graph's inputs and outputs are, in their order."""

    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class CallSignature(Record, frozen=True):
    """How a module is called: nested inputs and outputs, as JSON in text."""

    inputs: list[Argument]
    outputs: list[Argument]
    in_spec: str
    out_spec: str
    forward_arg_names: list[str] | None = None


class CallEntry(Record, frozen=True):
    """A module of the original model; the root has an empty name."""

    fqn: str
    signature: CallSignature | None = None


class GraphModule(Record, frozen=True):
    """A graph with its signature."""

    graph: Graph
    signature: Signature
    module_call_graph: list[CallEntry]
    metadata: dict[str, Any] = {}
    treespec_namedtuple_fields: dict[str, Any] = {}


class Range(Record, frozen=True):
    """The smallest and largest value of a free size; ``None`` means no limit."""

    min_val: int | None
    max_val: int | None


class Version(Record, frozen=True):
    """The version of this schema."""

    major: int
    minor: int


class Program(Record, frozen=True):
    """A whole exported program, without its weights. ``guards_code`` is Python text and never looked at."""

    graph_module: GraphModule
    opset_version: dict[str, int]
    range_constraints: dict[str, Range]
    schema_version: Version
    verifiers: list[str] = []
    torch_version: str = ""
    guards_code: list[str] = []
