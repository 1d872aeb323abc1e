from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repconv_cli.checkpoint.shapes import parse
from repconv_cli.errors import InputError

VALUES = [
    ("7", 7), ("s0", 10), ("s0 + 2", 12), ("(s0 + 1)//2", 5), ("-s0 + 12", 2), ("s0**2 - s1", 97), ("s0 % s1", 1),
    ("Max(1, s0 // 4, s1)", 3), ("Min(s0, s1)", 3), ("Mod(s0, 4)", 2), ("FloorDiv(s0 - 1, 2)", 4),
    ("Symbol('s0', positive=True, integer=True)", 10), ("Integer(-3)", -3),
    ("Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))", 19), ("Pow(Symbol('s1'), Integer(2))", 9),
    ("FloorDiv(Add(Symbol('s0'), Integer(1)), Integer(2))", 5),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_sizes_have_their_value_in_both_notations(text: str, value: int) -> None:
    expression = parse(text)
    assert expression.value({"s0": 10, "s1": 3}) == value
    assert parse(str(expression)).value({"s0": 10, "s1": 3}) == value


REFUSED = [
    "", "__import__('os').mkdir('x')", "open('x')", "s0.bit_length()", "[s0]", "s0 if s0 else 1", "lambda: 1", "'s0'",
    "Symbol(__import__('os'))", "Symbol('s0', integer=open('x'))", "Symbol('a b')", "(1).__class__", "1.5", "s0 / 2",
    "9 ** 9 ** 9", "s0 ** s0", "s0 << 9", "True", "FloorDiv(1)", "Max()", "Add(1, k=2)", "Function('f')(1)", "s0;s1",
    "f'{s0}'", "s0 := 1", "(" * 900, "-" * 999 + "1", "ſ0", "__s0", "99999999999999999999", "s0" * 600, "1\x1b[0m",
    "Integer(Symbol('s0'))", "x()", "Rational(1, 2)",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a plain expression") as caught:
        parse(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["s0 // 0", "s0 % (s0 - s0)", "s9", "(s0 ** 8) ** 8", "s0 * 4000000000000000000"])
def test_a_size_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has no value here"):
        parse(text).value({"s0": 1000})


@given(st.text(alphabet="s01+-*/%() ,MaxSymbol'", max_size=30))
def test_any_text_gives_a_number_or_a_refusal(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse(text).value({"s0": 5}), int)
