"""Conditions on sizes under which an exported graph holds, as torch writes them: which of them tie no size."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

# An input's axis, by the input's name as its placeholder has it, and the smallest size that it may have.
Bounds = dict[tuple[str, int], int]

# Guards that only say a size is not 1 (which broadcasts), bound it from below, or say that inputs come in batches of
# one size, do not tie a size to the example.
_BATCH = r"L(?:\[[^]]+\])+\.size\(\)\[0\]"
_TIMES = r"(?:(\d+) \* )?"
_HARMLESS = re.compile(rf".*(!= [01]|>= [012]|> [01])$|{_TIMES}{_BATCH} == {_TIMES}{_BATCH}$")
_ONE_BATCH = re.compile(rf"{_BATCH} (==|!=) (\d+)$")
_SIZE = re.compile(r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\]$")
_LARGEST_BOUND = 4096


@dataclass
class Conditions:
    """What ties sizes to the example's, and the lower bounds of those that are free all the same."""

    tied: list[str] = field(default_factory=list)
    bounds: Bounds = field(default_factory=dict)

    def special_batches(self) -> frozenset[int]:
        """Return the batches that are told from all others."""
        return frozenset(int(found[2]) for guard in self.tied if (found := _ONE_BATCH.match(guard)) is not None)

    def is_free_but_for_batches(self) -> bool:
        """Whether nothing is tied but that the batch is none of some numbers."""
        found = [_ONE_BATCH.match(guard) for guard in self.tied]
        return all(one is not None and one[1] == "!=" for one in found)


def conditions(guards: Iterable[str], names: Iterable[str]) -> Conditions:
    """Return what ``guards`` say of the sizes of the inputs called ``names``.

    >>> conditions(["L['x'].size()[2] >= 3", "L['x'].size()[3] == 8"], ["x"])
    Conditions(tied=["L['x'].size()[3] == 8"], bounds={('x', 2): 3})
    """
    found, known = Conditions(), set(names)
    for guard in guards:
        for part in _parts(guard):
            bound = _lower_bound(part)
            if bound is not None and bound[0][0] in known and bound[0][1] > 0:
                place, smallest = bound
                found.bounds[place] = max(smallest, found.bounds.get(place, 1))
            elif not _is_harmless(ast.unparse(part)):
                found.tied.append(guard)
    return found


def _is_harmless(condition: str) -> bool:
    """Whether ``condition`` ties nothing to the example.

    >>> _is_harmless("6400 * L['x'].size()[0] == 6400 * L['y'].size()[0]"), _is_harmless("2 * L['x'].size()[0] == 8")
    (True, False)
    """
    found = _HARMLESS.match(condition)
    # The same multiple of two batches on both sides; a condition of another kind has neither factor.
    return found is not None and found[2] == found[3]


def _parts(guard: str) -> Iterator[ast.expr]:
    """Yield the conditions that ``guard`` joins with ``and``; what is no Python is one that nothing is known of."""
    try:
        whole = ast.parse(guard, mode="eval").body
    except SyntaxError:
        whole = ast.Constant(guard)
    yield from whole.values if isinstance(whole, ast.BoolOp) and isinstance(whole.op, ast.And) else [whole]


def _lower_bound(condition: ast.expr) -> tuple[tuple[str, int], int] | None:
    """Return an axis and its smallest size where the condition says just that, None where it says anything else.

    As ``1 + (size - 3) // 2 >= 3`` does: what stands on the left grows with the size.
    """
    if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
        return None
    limit, grows = _number(condition.comparators[0]), _growing(condition.left)
    if limit is None or grows is None or not isinstance(condition.ops[0], (ast.GtE, ast.Gt)):
        return None
    place, value = grows
    least = limit + isinstance(condition.ops[0], ast.Gt)
    smallest = next((size for size in range(1, _LARGEST_BOUND) if value(size) >= least), None)
    return None if smallest is None else (place, smallest)


def _growing(term: ast.expr) -> tuple[tuple[str, int], Callable[[int], int]] | None:
    """Return the one size in ``term``, and its value as a function of it, where that never falls as the size grows."""
    if (size := _SIZE.match(ast.unparse(term))) is not None:
        path = re.findall(r"\[(?:'([^']*)'|(\d+))\]", size[1])
        return ("_".join(name or index for name, index in path), int(size[2])), lambda value: value
    if not isinstance(term, ast.BinOp):
        return None
    left, right = _number(term.left), _number(term.right)
    inner = _growing(term.right if left is not None else term.left)
    number = left if left is not None else right
    if inner is None or number is None or (left is not None and not isinstance(term.op, (ast.Add, ast.Mult))):
        return None
    place, value = inner
    if isinstance(term.op, ast.Add):
        return place, lambda size: value(size) + number
    if isinstance(term.op, ast.Sub):
        return place, lambda size: value(size) - number
    if isinstance(term.op, ast.Mult) and number > 0:
        return place, lambda size: value(size) * number
    if isinstance(term.op, ast.FloorDiv) and number > 0:
        return place, lambda size: value(size) // number
    return None


def _number(term: ast.expr) -> int | None:
    if isinstance(term, ast.UnaryOp) and isinstance(term.op, ast.USub):
        inner = _number(term.operand)
        return None if inner is None else -inner
    return term.value if isinstance(term, ast.Constant) and type(term.value) is int else None
