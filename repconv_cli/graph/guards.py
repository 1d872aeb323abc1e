"""Conditions on sizes under which an exported graph holds, as torch writes them: which of them tie no size.

A condition that no law here shows to hold from some size on ties its sizes to the example's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from repconv_cli.graph.bounds import Bounds, axis_of, lower_bounds, places_in

# That an axis of two inputs has one size does not tie it to the example.
_TIMES = r"(?:(\d+) \* )?"
_SIZE_OF = r"L((?:\[[^]]+\])+)\.size\(\)\[(\d+)\]"
_SAME_SIZE = re.compile(rf"{_TIMES}{_SIZE_OF} == {_TIMES}{_SIZE_OF}$")
_BATCH = r"L(?:\[[^]]+\])+\.size\(\)\[0\]"
_ONE_BATCH = re.compile(rf"{_BATCH} (==|!=) (\d+)$")


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
        """Return the axes in space that a condition ties by itself, none where a batch is tied so.

        Such as the channels of tokens. Of one size, they may be all that tied the others.
        """
        places = [{found for part in _parts(guard) for found in places_in(part)} for guard in self.tied]
        alone = {min(found) for found in places if len(found) == 1}
        return alone if all(axis > 0 for _, axis in alone) else set()

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
            bounds = lower_bounds(part)
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
    names = axis_of(found[2], found[3])[0], axis_of(found[5], found[6])[0]
    return None if names[0] == names[1] else (int(found[3]), names)


def _parts(guard: str) -> Iterator[ast.expr]:
    """Yield the conditions that ``guard`` joins with ``and``; what is no Python is one that nothing is known of."""
    try:
        whole = ast.parse(guard, mode="eval").body
    except SyntaxError:
        whole = ast.Constant(guard)
    yield from whole.values if isinstance(whole, ast.BoolOp) and isinstance(whole.op, ast.And) else [whole]
