"""Calls of operators that a file asks for, checked before they become part of a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from repconv_cli.errors import InputError
from repconv_cli.graph.operators import draws_random, writes_statistics

MOST_BITS = 1024
"""Bits of a number that sizes are computed with; a few products square and square again to any length."""

MOST_POWER = 8
"""What a size may be raised to."""

_SIZE_BITS = 64


def checked_call(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Return a new call in ``graph``.

    Raises :class:`InputError` unless the argument names and their number are those of the operator's schema, and for
    arithmetic on sizes unless its operands are numbers and its result is one of a sensible length.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check_operator(target, args, kwargs)
        return graph.call_function(target, args, kwargs)
    if kwargs or not 1 <= len(args) <= 2 or not all(isinstance(arg, (fx.Node, int, float)) for arg in args):
        raise InputError(f"its graph calls {target.__name__} with other arguments than two values or numbers")
    lengths = [_bits(arg) for arg in args]
    bits = sum(lengths) if target is operator.mul else max(lengths) + 1
    if target is operator.pow:
        power = args[-1]
        if isinstance(power, fx.Node) or len(args) < 2 or not abs(power) <= MOST_POWER:
            raise InputError(f"its graph raises a size to {power}", needed=f"a number, at most {MOST_POWER}")
        bits = lengths[0] * max(math.ceil(power), 1)
    if bits > MOST_BITS:
        raise InputError(f"its graph computes a size of up to {bits} bits", needed=f"at most {MOST_BITS}")
    node = graph.call_function(target, args)
    node.meta["bits"] = bits
    return node


def _bits(value: object) -> int:
    if isinstance(value, fx.Node):
        return int(value.meta.get("bits", _SIZE_BITS))
    return value.bit_length() if isinstance(value, int) else _SIZE_BITS


def _check_operator(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = [argument.name for argument in target._schema.arguments]
    if len(args) > len(names) or not set(kwargs) <= set(names):
        raise InputError(f"its graph calls {target} with arguments that it does not take")
    if draws_random(target, args, kwargs):
        raise InputError(f"its graph draws random numbers with {target}")
    if writes_statistics(target, args, kwargs):
        raise InputError(f"its graph calls {target} in training mode, which would change the statistics in the file")
