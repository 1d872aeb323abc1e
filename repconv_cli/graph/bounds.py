"""From which sizes on a condition always holds.

Both sides are polynomials in *atoms*: sizes, and what is rounded down, the largest or the smallest of something. Each
atom has a least value and may be anything above it, so with ``atom = least + t`` a polynomial whose coefficients are
all positive in the ``t`` is nowhere smaller than its constant. What that does not show is not taken to hold.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

# The monomial of some atoms (one that is squared, twice), with its coefficient.
Polynomial = dict[tuple[str, ...], int]

# An input's axis, by the input's name as its placeholder has it, and the smallest size that it may have.
Bounds = dict[tuple[str, int], int]

_SIZE = re.compile(r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\]$")
_LARGEST_BOUND = 4096
_LARGEST_POWER = 4
_MOST_MONOMIALS = 256
# torch takes a batch of two for any but one. A condition on it alone is looked at by itself there.
_LEAST_BATCH = 2
_LARGEST_OR_SMALLEST: dict[str, Callable[[list[int]], int]] = {"torch.sym_max": max, "torch.sym_min": min}


def lower_bounds(condition: ast.expr) -> Bounds | None:
    """Return the smallest sizes from which on ``condition`` always holds, None where there are none that are known.

    >>> lower_bounds(ast.parse("1 + (L['x'].size()[2] - 3) // 2 >= 3", mode="eval").body)
    {('x', 2): 7}
    >>> lower_bounds(ast.parse("L['x'].size()[2] % 2 == 0", mode="eval").body)
    """
    if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
        return None
    comparison = _Comparison(condition.left, condition.ops[0], condition.comparators[0])
    if not comparison.is_known():
        return None
    places = {found for found in places_in(condition) if found[1] > 0}
    # What holds from one size on holds from the next one on.
    above = 1
    while not comparison.holds(above):
        above *= 2
        if above > _LARGEST_BOUND or not places:
            return None
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        above, below = (middle, below) if comparison.holds(middle) else (above, middle)
    return {found: above for found in sorted(places) if above > 1}


def place(term: ast.AST) -> tuple[str, int] | None:
    """Return the input and the axis whose size ``term`` is."""
    size = _SIZE.match(ast.unparse(term)) if isinstance(term, ast.Subscript) else None
    return None if size is None else axis_of(size[1], size[2])


def places_in(condition: ast.expr) -> set[tuple[str, int]]:
    """Return the inputs and axes whose sizes ``condition`` speaks of."""
    return {found for node in ast.walk(condition) if (found := place(node)) is not None}


def axis_of(path: str, axis: str) -> tuple[str, int]:
    """Return an input's name as its placeholder has it, and the number of an axis.

    >>> axis_of("['xs'][0]", "2")
    ('xs_0', 2)
    """
    parts = re.findall(r"\[(?:'([^']*)'|(\d+))\]", path)
    return "_".join(name or index for name, index in parts), int(axis)


class _Comparison:
    """A comparison of two terms, of a remainder with 0 among them."""

    def __init__(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> None:
        speaks_of_space = any(axis > 0 for side in (left, right) for _, axis in places_in(side))
        self.terms, self.operator = _Terms(1 if speaks_of_space else _LEAST_BATCH), operator
        self.is_remainder = isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod)
        if isinstance(left, ast.BinOp) and self.is_remainder:
            is_of_nothing = isinstance(right, ast.Constant) and right.value == 0
            self.left, self.right = self.terms.of(left.left), self.terms.of(left.right) if is_of_nothing else None
        else:
            self.left, self.right = self.terms.of(left), self.terms.of(right)

    def is_known(self) -> bool:
        """Whether both sides are polynomials."""
        return self.left is not None and self.right is not None

    def holds(self, size: int) -> bool:
        """Whether it is shown to hold for all sizes from ``size`` on."""
        assert self.left is not None
        assert self.right is not None
        difference, opposite = _sum(self.left, self.right, -1), _sum(self.right, self.left, -1)
        if self.is_remainder:
            if isinstance(self.operator, ast.Eq):
                return _is_multiple(self.left, self.right) and self._is_at_least(self.right, 1, size)
            # What is divided by more than it is leaves itself.
            is_smaller = self._is_at_least(self.left, 1, size) and self._is_at_least(opposite, 1, size)
            return isinstance(self.operator, ast.NotEq) and is_smaller
        if isinstance(self.operator, ast.Eq):
            return not difference
        if isinstance(self.operator, ast.NotEq):
            return self._is_at_least(difference, 1, size) or self._is_at_least(opposite, 1, size)
        is_larger = isinstance(self.operator, (ast.Gt, ast.GtE))
        if not is_larger and not isinstance(self.operator, (ast.Lt, ast.LtE)):
            return False
        least = int(isinstance(self.operator, (ast.Gt, ast.Lt)))
        return self._is_at_least(difference if is_larger else opposite, least, size)

    def _is_at_least(self, polynomial: Polynomial, least: int, size: int) -> bool:
        found = self.terms.least(polynomial, size)
        return found is not None and found >= least


class _Terms:
    """Terms as polynomials, and what their atoms are."""

    def __init__(self, least_batch: int) -> None:
        self.least_batch = least_batch
        self.atoms: dict[str, ast.expr] = {}

    def of(self, term: ast.expr) -> Polynomial | None:
        """Return ``term`` as a polynomial, None where it is none of whole numbers."""
        if isinstance(term, ast.Constant):
            is_whole = type(term.value) is int
            return ({(): term.value} if term.value else {}) if is_whole else None  # type: ignore[dict-item]
        if isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
            inner = self.of(term.operand)
            return None if inner is None else _sum({}, inner, -1)
        if place(term) is not None or isinstance(term, ast.Call) or _is_floor(term):
            self.atoms[ast.unparse(term)] = term
            return {(ast.unparse(term),): 1}
        if not isinstance(term, ast.BinOp):
            return None
        left, right = self.of(term.left), self.of(term.right)
        if left is None or right is None:
            return None
        if isinstance(term.op, (ast.Add, ast.Sub)):
            return _sum(left, right, 1 if isinstance(term.op, ast.Add) else -1)
        if isinstance(term.op, ast.Mult):
            return _product(left, right)
        if isinstance(term.op, ast.Pow) and set(right) <= {()} and 0 <= right.get((), 0) <= _LARGEST_POWER:
            power: Polynomial | None = {(): 1}
            for _ in range(right.get((), 0)):
                power = None if power is None else _product(power, left)
            return power
        return None

    def least(self, polynomial: Polynomial, size: int) -> int | None:
        """Return a number that ``polynomial`` is nowhere below, for sizes from ``size`` on; None if none is known."""
        total: Polynomial = {}
        for monomial, coefficient in polynomial.items():
            shifted: Polynomial | None = {(): coefficient}
            for atom in monomial:
                lowest = self._least_atom(self.atoms[atom], size)
                if lowest is None or shifted is None:
                    return None
                shifted = _product(shifted, _sum({(atom,): 1}, {(): lowest}, 1))
            if shifted is None:
                return None
            total = _sum(total, shifted, 1)
        return None if any(value < 0 for monomial, value in total.items() if monomial) else total.get((), 0)

    def _least_atom(self, atom: ast.expr, size: int) -> int | None:
        if (found := place(atom)) is not None:
            return size if found[1] > 0 else self.least_batch
        inner = [self.of(part) for part in (atom.args if isinstance(atom, ast.Call) else [atom.left])]  # type: ignore[attr-defined]
        lowest = [None if part is None else self.least(part, size) for part in inner]
        known = [value for value in lowest if value is not None]
        if not known or len(known) < len(lowest):
            return None
        if isinstance(atom, ast.Call):
            choose = _LARGEST_OR_SMALLEST.get(ast.unparse(atom.func))
            return None if choose is None else choose(known)
        divisor: int = atom.right.value  # type: ignore[attr-defined]
        return known[0] // divisor


def _is_floor(term: ast.expr) -> bool:
    """Whether a term is something over a positive number, rounded down."""
    if not isinstance(term, ast.BinOp) or not isinstance(term.op, ast.FloorDiv):
        return False
    divisor = term.right.value if isinstance(term.right, ast.Constant) else None
    return type(divisor) is int and divisor > 0


def _sum(one: Polynomial, other: Polynomial, factor: int) -> Polynomial:
    """Return ``one + factor * other``."""
    total = dict(one)
    for monomial, coefficient in other.items():
        total[monomial] = total.get(monomial, 0) + factor * coefficient
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def _product(one: Polynomial, other: Polynomial) -> Polynomial | None:
    """Return ``one * other``, None where that would be long."""
    if len(one) * len(other) > _MOST_MONOMIALS:
        return None
    total: Polynomial = {}
    for left, first in one.items():
        for right, second in other.items():
            monomial = tuple(sorted((*left, *right)))
            total[monomial] = total.get(monomial, 0) + first * second
    return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}


def _is_multiple(value: Polynomial, divisor: Polynomial) -> bool:
    """Whether ``value`` is ``divisor`` times a whole number, or has a single product ``divisor`` in every part."""
    if not divisor:
        return False
    monomial, coefficient = next(iter(divisor.items()))
    if len(divisor) == 1:
        return all(value[part] % coefficient == 0 and _has(part, monomial) for part in value)
    times, rest = divmod(value.get(monomial, 0), coefficient)
    return not rest and not _sum(value, divisor, -times)


def _has(monomial: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return all(monomial.count(atom) >= part.count(atom) for atom in part)
