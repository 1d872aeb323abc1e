"""Symbolic sizes of an exported graph: a small grammar of whole numbers, read and evaluated here.

torch hands such text to a general expression evaluator, which a file could use to run code. Here, text is split into
a syntax tree (which runs nothing) and each node of the tree has to be on a short list.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError

LONGEST_TEXT = 1000
LARGEST = 1 << 62
_LARGEST_POWER = 8

Node: TypeAlias = "int | str | tuple[str, tuple[Node, ...]]"
"""A number, the name of a symbol, or an operation with its operands."""


@dataclass(frozen=True)
class SizeExpression:
    """A size that depends on free sizes, such as ``(s0 + 1) // 2``.

    >>> half = parse("FloorDiv(Add(Symbol('s0', positive=True, integer=True), Integer(1)), Integer(2))")
    >>> sorted(half.symbols()), half.value({"s0": 7})
    (['s0'], 4)
    >>> str(half)
    '((s0 + 1) // 2)'
    """

    root: Node

    def symbols(self) -> frozenset[str]:
        """Return the names of the free sizes it depends on."""
        return frozenset(_symbols(self.root))

    def value(self, sizes: Mapping[str, int]) -> int:
        """Return the number that it stands for when the symbols have these values.

        Raises:
            InputError: a symbol has no value, something is divided by zero, or the number is out of range.
        """
        try:
            return _value(self.root, sizes)
        except (ZeroDivisionError, KeyError, OverflowError):
            raise InputError(f"the size {quoted(self)} has no value here") from None

    def __str__(self) -> str:
        return _text(self.root)


def parse(text: str) -> SizeExpression:
    """Return the size that ``text`` describes, in either way that torch writes one.

    Those are ``s0 + 2`` and ``Add(Symbol('s0', integer=True), Integer(2))``.

    Raises:
        InputError: it holds anything but whole numbers, symbols and the operations on the list.
    """
    try:
        if len(text) > LONGEST_TEXT or not text.isascii():
            raise ValueError
        return SizeExpression(_node(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(
            f"the size {quoted(text)} is not a plain expression", needed="whole numbers, symbols, + - * // and Mod"
        ) from None


def _node(tree: ast.expr) -> Node:
    if isinstance(tree, ast.Constant) and type(tree.value) is int and tree.value < LARGEST:
        return tree.value
    if isinstance(tree, ast.Name) and not tree.id.startswith("__"):
        return tree.id
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return ("*", (-1, _node(tree.operand)))
    if isinstance(tree, ast.BinOp) and type(tree.op) in _INFIX:
        return _operation(_INFIX[type(tree.op)], (_node(tree.left), _node(tree.right)))
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        return _call(tree.func.id, tree)
    raise ValueError


def _call(name: str, tree: ast.Call) -> Node:
    if name == "Symbol":
        # What it is assumed to be (positive, integer) says nothing that the range constraints don't.
        (argument,) = tree.args
        if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
            raise ValueError
        if not argument.value.isidentifier() or not all(isinstance(k.value, ast.Constant) for k in tree.keywords):
            raise ValueError
        return argument.value
    if tree.keywords:
        raise ValueError
    operands = tuple(_node(argument) for argument in tree.args)
    if name == "Integer":
        (number,) = operands
        sign, value = (-1, number[1][1]) if isinstance(number, tuple) and number[0] == "*" else (1, number)
        if not isinstance(value, int):
            raise ValueError
        return sign * value
    return _operation(_CALLS.get(name, ""), operands)


def _operation(name: str, operands: tuple[Node, ...]) -> Node:
    if name not in _OPERATIONS or (name not in _ANY_COUNT and len(operands) != 2) or not operands:
        raise ValueError
    if name == "**" and not (isinstance(operands[1], int) and 0 <= operands[1] <= _LARGEST_POWER):
        raise ValueError
    return (name, operands)


def _value(node: Node, sizes: Mapping[str, int]) -> int:
    if isinstance(node, int):
        return node
    if isinstance(node, str):
        return sizes[node]
    name, operands = node
    result = reduce(_OPERATIONS[name], (_value(operand, sizes) for operand in operands))
    if abs(result) > LARGEST:
        raise OverflowError
    return result


def _symbols(node: Node) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, tuple):
        for operand in node[1]:
            yield from _symbols(operand)


def _text(node: Node) -> str:
    if not isinstance(node, tuple):
        return str(node)
    name, operands = node
    texts = [_text(operand) for operand in operands]
    return f"{name}({', '.join(texts)})" if name in ("Max", "Min") else f"({f' {name} '.join(texts)})"


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
    "Max": max,
    "Min": min,
}
_ANY_COUNT = frozenset(["+", "*", "Max", "Min"])
_INFIX: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
}  # fmt: skip
_CALLS = {
    "Add": "+", "Mul": "*", "Pow": "**", "FloorDiv": "//", "CleanDiv": "//",
    "Mod": "%", "PythonMod": "%", "Max": "Max", "Min": "Min",
}  # fmt: skip
