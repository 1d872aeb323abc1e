"""Conditions on sizes under which an exported graph holds, as torch writes them: which of them tie no size.

A condition that no law here shows to hold from some size on ties its sizes to the example's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

# An input's axis, by the input's name as its placeholder has it, and the smallest size that it may have.
Bounds = dict[tuple[str, int], int]

# That an axis of two inputs has one size does not tie it to the example.
_TIMES = r"(?:(\d+) \* )?"
_SIZE_OF = r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\]"
_SAME_SIZE = re.compile(rf"{_TIMES}{_SIZE_OF} == {_TIMES}{_SIZE_OF}$")
_BATCH = r"L(?:\[[^]]+\])+\.size\(\)\[0\]"
_ONE_BATCH = re.compile(rf"{_BATCH} (==|!=) (\d+)$")
_SIZE = re.compile(r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\]$")
_ONE_SIZE = re.compile(r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\] == \d+$")
_LARGEST_BOUND = 4096
_NEXT_TO_NOTHING = 2
_LARGEST_OR_SMALLEST: dict[str, Callable[[list[int]], int]] = {"torch.sym_max": max, "torch.sym_min": min}


@dataclass
class Conditions:
    """What ties sizes to the example's, the lower bounds of those that are free all the same, and which are equal.

    ``same`` are axes with the names of two inputs that have one size there.
    """

    tied: list[str] = field(default_factory=list)
    bounds: Bounds = field(default_factory=dict)
    same: list[tuple[int, tuple[str, str]]] = field(default_factory=list)

    def same_as(self, name: str, axis: int) -> str:
        """Return the first, by name, of the inputs that have the size of this one's ``axis``; "" where that is it."""
        group: set[str] = set()
        more = {name}
        while more - group:
            group |= more
            more = {other for at, pair in self.same if at == axis and group.intersection(pair) for other in pair}
        return "" if min(group) == name else min(group)

    def special_batches(self) -> frozenset[int]:
        """Return the batches that are told from all others."""
        return frozenset(int(found[2]) for guard in self.tied if (found := _ONE_BATCH.match(guard)) is not None)

    def fixed(self) -> set[tuple[str, int]]:
        """Return the axes of inputs that have one size alone, none where anything else, or a batch, is tied too."""
        found = [_ONE_SIZE.match(guard) for guard in self.tied]
        axes = {_axis(one[1], one[2]) for one in found if one is not None}
        return axes if all(found) and all(axis > 0 for _, axis in axes) else set()

    def is_free_but_for_batches(self) -> bool:
        """Whether nothing is tied but that the batch is none of some numbers."""
        found = [_ONE_BATCH.match(guard) for guard in self.tied]
        return all(one is not None and one[1] == "!=" for one in found)


def conditions(guards: Iterable[str], names: Collection[str], examples: Bounds | None = None) -> Conditions:
    """Return what ``guards`` say of the sizes of the inputs called ``names``, which have ``examples`` for sizes.

    >>> conditions(["L['x'].size()[2] >= 3", "L['x'].size()[3] == 8"], ["x"])
    Conditions(tied=["L['x'].size()[3] == 8"], bounds={('x', 2): 3}, same=[])
    """
    found, traced = Conditions(), examples or {}
    # A placeholder of a ``**kwargs`` has the name of the keyword alone.
    known = {f"kwargs_{name}": name for name in names} | {name: name for name in names}
    for guard in guards:
        for part in _parts(guard):
            same = _same_sizes(ast.unparse(part))
            if same is not None and known.keys() >= set(same[1]):
                axis, (one, other) = same
                found.same.append((axis, (known[one], known[other])))
                continue
            bounds = _lower_bounds(part)
            if bounds is None or any(name not in known for name, _ in bounds):
                found.tied.append(guard)
                continue
            places = {(known[name], axis): least for (name, axis), least in bounds.items()}
            if any(least > traced.get(place, least) for place, least in places.items()):
                found.tied.append(guard)
                continue
            for place, least in places.items():
                found.bounds[place] = max(least, found.bounds.get(place, 1))
    return found


def _same_sizes(condition: str) -> tuple[int, tuple[str, str]] | None:
    """Return the axis that ``condition`` says two inputs have in common, and their names; None where it does not.

    >>> _same_sizes("6400 * L['x'].size()[0] == 6400 * L['y'].size()[0]")
    (0, ('x', 'y'))
    >>> _same_sizes("2 * L['x'].size()[0] == 8")
    """
    found = _SAME_SIZE.match(condition)
    # The same multiple of both.
    if found is None or found[1] != found[4] or found[3] != found[6]:
        return None
    names = _axis(found[2], found[3])[0], _axis(found[5], found[6])[0]
    return None if names[0] == names[1] else (int(found[3]), names)


def _parts(guard: str) -> Iterator[ast.expr]:
    """Yield the conditions that ``guard`` joins with ``and``; what is no Python is one that nothing is known of."""
    try:
        whole = ast.parse(guard, mode="eval").body
    except SyntaxError:
        whole = ast.Constant(guard)
    yield from whole.values if isinstance(whole, ast.BoolOp) and isinstance(whole.op, ast.And) else [whole]


def _lower_bounds(condition: ast.expr) -> Bounds | None:
    """Return the smallest sizes from which on ``condition`` always holds, None where there are none that are known.

    ``1 + (size - 3) // 2 >= 3`` does, as what stands on the left grows with the size; so does ``size - 2 != 1``.
    Batches have no bound: torch takes one of two for any but one, which is looked at by itself.
    """
    if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
        return None
    limit, operator = _number(condition.comparators[0]), condition.ops[0]
    if limit is None or not isinstance(operator, (ast.GtE, ast.Gt, ast.NotEq)):
        return None
    places = {place for node in ast.walk(condition.left) if (place := _place(node)) is not None}
    spatial = {place for place in places if place[1] > 0}
    # Of several sizes each may be small where the others are large; only what is next to nothing is asked of all.
    if len(spatial) > 1 and limit > _NEXT_TO_NOTHING:
        return None
    least = limit + (not isinstance(operator, ast.GtE))
    for size in range(1, _LARGEST_BOUND):
        value = _value(condition.left, size, 1 if spatial else 2)
        if value is not None and value >= least:
            return {place: size for place in spatial if size > 1}
        if not spatial:
            break
    return None


def _place(term: ast.AST) -> tuple[str, int] | None:
    """Return the input and the axis whose size ``term`` is."""
    size = _SIZE.match(ast.unparse(term)) if isinstance(term, ast.Subscript) else None
    return None if size is None else _axis(size[1], size[2])


def _axis(path: str, axis: str) -> tuple[str, int]:
    """Return an input's name as its placeholder has it, and the number of an axis.

    >>> _axis("['xs'][0]", "2")
    ('xs_0', 2)
    """
    parts = re.findall(r"\[(?:'([^']*)'|(\d+))\]", path)
    return "_".join(name or index for name, index in parts), int(axis)


def _value(term: ast.expr, size: int, batch: int) -> int | None:
    """Return ``term`` with all sizes ``size``, batches ``batch``; None where it may fall as one of them grows."""
    if (number := _number(term)) is not None:
        return number
    if (place := _place(term)) is not None:
        return size if place[1] > 0 else batch
    if isinstance(term, ast.Call) and ast.unparse(term.func) in _LARGEST_OR_SMALLEST:
        values = [_value(argument, size, batch) for argument in term.args]
        known = [value for value in values if value is not None]
        return _LARGEST_OR_SMALLEST[ast.unparse(term.func)](known) if known and len(known) == len(values) else None
    if not isinstance(term, ast.BinOp):
        return None
    left, right = _value(term.left, size, batch), _value(term.right, size, batch)
    if left is None or right is None:
        return None
    if isinstance(term.op, ast.Add):
        return left + right
    if isinstance(term.op, ast.Mult):
        # What is not negative here is not so at larger sizes either.
        return left * right if min(left, right) >= 0 else None
    divisor = _number(term.right)
    if isinstance(term.op, ast.Sub):
        return None if divisor is None else left - divisor
    if isinstance(term.op, ast.FloorDiv):
        return None if divisor is None or divisor <= 0 else left // divisor
    return None


def _number(term: ast.expr) -> int | None:
    if isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
        inner = _number(term.operand)
        return None if inner is None else -inner
    return term.value if isinstance(term, ast.Constant) and type(term.value) is int else None
