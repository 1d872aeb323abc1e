"""Arguments, sizes and nesting of an exported program, decoded from the schema's unions into plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, cast

import msgspec

from repconv_cli.checkpoint import pt2_schema as schema
from repconv_cli.checkpoint.program import FreeSize, TorchConstant, ValueRef, ValueShape
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.reading import require_few_parts
from repconv_cli.checkpoint.shapes import SizeExpression, parse
from repconv_cli.errors import DamagedFileError, InputError

MOST_JSON_BYTES = 64 << 20
_DEEPEST_SPEC = 50


def the_one(record: schema.Record) -> tuple[str, Any]:
    """Return the field of a union that is set, and its value.

    Raises:
        DamagedFileError: none is, or several are.
    """
    fields = [(name, value) for name in record.__struct_fields__ if (value := getattr(record, name)) is not None]
    if len(fields) != 1:
        raise DamagedFileError(f"its graph has a {type(record).__name__} with {len(fields)} values", needed="one")
    return fields[0]


def argument(record: schema.Argument) -> object:
    """Return a plain value, a :class:`ValueRef`, a :class:`TorchConstant`, or lists of them."""
    name, value = the_one(record)
    return _DECODERS.get(name, _plain)(value)


def size(record: schema.SymInt) -> int | FreeSize:
    """Return a size: a number, or a free one whose expression has been read by the small grammar."""
    _, value = the_one(record)
    if isinstance(value, int):
        return value
    parsed = parse(value.expr_str)
    if isinstance(parsed.root, int):
        return parsed.root
    return FreeSize(parsed, value.hint.as_int if value.hint else None)


def shape(name: str, meta: schema.TensorMeta) -> ValueShape:
    """Return the shape of a tensor of the graph.

    Raises:
        InputError: it is not dense, or its dtype is not one that is read here.
        DamagedFileError: a size is negative.
    """
    if meta.layout not in schema.LAYOUTS or meta.dtype not in schema.DTYPES:
        raise InputError(f"tensor {quoted(name)} is not an ordinary dense tensor of numbers")
    sizes = tuple(size(item) for item in meta.sizes)
    if len(sizes) > 25 or any(isinstance(item, int) and item < 0 for item in sizes):
        raise DamagedFileError(f"tensor {quoted(name)} has no possible shape")
    return ValueShape(sizes, schema.DTYPES[meta.dtype])


def nesting(text: str) -> dict[str, object]:
    """Return a nested specification of inputs or outputs as plain dicts, its contexts parsed.

    Raises:
        DamagedFileError: it is not one, or is nested too deeply.
    """
    try:
        version, root = json.loads(text)
        if version != 1:
            raise ValueError
        return _spec(root, 0)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DamagedFileError("its description of nested inputs and outputs is not one") from None


def _spec(item: object, depth: int) -> dict[str, object]:
    if not isinstance(item, dict) or depth > _DEEPEST_SPEC or not isinstance(item["children_spec"], list):
        raise ValueError
    kind, context = item["type"], item["context"]
    if not (kind is None or isinstance(kind, str)) or not (context is None or isinstance(context, str)):
        raise ValueError
    children = [_spec(child, depth + 1) for child in item["children_spec"]]
    return {"type": kind, "context": _context(context), "children_spec": children}


def _context(text: str | None) -> object:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(value: object) -> object:
    return value


def _reference(value: schema.Named) -> ValueRef:
    return ValueRef(value.name)


def _references(values: list[schema.Named]) -> list[ValueRef]:
    return [ValueRef(value.name) for value in values]


def _float(value: float | str) -> float:
    return {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}[value] if isinstance(value, str) else value


def _symbolic(value: schema.SymArgument) -> object:
    name, inner = the_one(value)
    return ValueRef(inner) if name == "as_name" else inner


def _optional(value: schema.OptionalTensor) -> ValueRef | None:
    name, inner = the_one(value)
    return ValueRef(inner.name) if name == "as_tensor" else None


def _constant(kind: str, table: dict[int, str]) -> Callable[[int], TorchConstant]:
    def decode(value: int) -> TorchConstant:
        if value not in table:
            raise InputError(f"its graph uses the {kind.replace('_', ' ')} number {value}, which is not known here")
        return TorchConstant(cast(Any, kind), table[value])

    return decode


def _each(decode: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda values: [decode(value) for value in values]


_DECODERS: dict[str, Callable[[Any], object]] = {
    "as_none": lambda _: None,
    "as_tensor": _reference,
    "as_tensors": _references,
    "as_nested_tensors": _each(_references),
    "as_float": _float,
    "as_floats": _each(_float),
    "as_sym_int": _symbolic,
    "as_sym_ints": _each(_symbolic),
    "as_sym_float": _symbolic,
    "as_sym_floats": _each(_symbolic),
    "as_sym_bool": _symbolic,
    "as_sym_bools": _each(_symbolic),
    "as_scalar_type": _constant("dtype", schema.DTYPES),
    "as_memory_format": _constant("memory_format", schema.MEMORY_FORMATS),
    "as_layout": _constant("layout", schema.LAYOUTS),
    "as_device": lambda _: TorchConstant("device", "cpu"),
    "as_optional_tensor": _optional,
    "as_optional_tensors": _each(_optional),
    "as_complex": lambda value: complex(_float(value.real), _float(value.imag)),
}


def decoded(text: bytes, kind: type[Any], what: str) -> Any:
    """Return JSON as a record of the schema.

    Raises:
        InputError: it is not JSON, is too large, or has a field, a type or a kind that the schema does not have; it
            is named.
    """
    require_few_parts(text, what)
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{what} does not follow torch.export's schema: {quoted(error, limit=200)}") from None


def range_of(name: str, limits: schema.Range) -> tuple[str, tuple[int | None, int | None]]:
    """Return a free size's symbol and its limits.

    Raises:
        InputError: what is limited is not a symbol.
    """
    expression: SizeExpression = parse(name)
    if not isinstance(expression.root, str):
        raise InputError(f"a range is given for {quoted(name)}", needed="the name of a free size")
    return expression.root, (limits.min_val, limits.max_val)
