"""The blocks in a file, from the names and the shapes of its tensors alone. No torch here."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from repconv_cli.checkpoint.families.parts import (
    Chain,
    Each,
    Family,
    Identity,
    Layer,
    Maybe,
    Minus,
    Norm,
    Part,
    Row,
    Scale,
    Shift,
    Sum,
    leaves,
)
from repconv_cli.checkpoint.families.shapes import fits, is_square
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError

Shapes = Mapping[str, tuple[int, ...]]
STATISTICS = ("running_mean", "running_var")
NORM_KEYS = ("weight", "bias", *STATISTICS)
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class FamilyBlock:
    """One block of a file: its parts with whole keys, and the path of its one convolution in the deploy form.

    ``sources`` are the keys that go into it. ``removed`` are those that the deploy form lacks: without those that other
    tensors still need, and with the norms' batch counters.
    """

    name: str
    part: Part
    target: str
    sources: tuple[str, ...]
    removed: tuple[str, ...]
    guesses_identity: bool = False


@dataclass(frozen=True)
class Found:
    """What a file holds, by a family's table.

    ``dead`` are tensors that are left out because the deploy form has no such key, ``replaced`` those that lie under
    a deploy key though the block is not fused; ``fused`` counts the blocks in deploy form already.
    """

    family: Family
    blocks: tuple[FamilyBlock, ...]
    kept: tuple[str, ...]
    dead: tuple[str, ...]
    replaced: tuple[str, ...]
    fused: int


class _LacksError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def find_blocks(family: Family, shapes: Shapes) -> Found:
    """Return the blocks of ``family`` among tensors of these names and ``shapes``.

    Raises :class:`DamagedFileError` for a block that lacks a tensor, or has one that does not fit the others.
    """
    finder = _Finder(family, shapes)
    for row in family.rows:
        finder.find(row)
    finder.require_whole()
    return finder.result()


class _Finder:
    """Walks the rows of a family; a layer belongs to the first row that takes it, a norm may belong to several."""

    def __init__(self, family: Family, shapes: Shapes) -> None:
        self.family, self.shapes = family, shapes
        self.names = sorted(shapes)
        self.order = {key: index for index, key in enumerate(shapes)}
        self.claimed: set[str] = set()
        self.broken: dict[str, DamagedFileError] = {}
        self.blocks: list[FamilyBlock] = []

    def find(self, row: Row) -> None:
        """Take every block of one kind."""
        trigger = _trigger(row.part)
        for key in self.shapes:
            place = trigger(key)
            if place is None or key in self.claimed or not (place or row.deploy):
                continue
            try:
                self._take(row, place)
            except _LacksError as error:
                if not row.ambiguous and (self._is_half_a_norm(error.key) or self._has_others(row, key, place)):
                    self.broken.setdefault(key, self._broken(place or row.deploy, error.key))

    def _broken(self, name: str, key: str) -> DamagedFileError:
        return DamagedFileError(f"block {quoted(name)} looks like {self.family.name} and lacks {quoted(key)}")

    def _is_half_a_norm(self, key: str) -> bool:
        """Whether the norm that ``key`` belongs to has one of its two statistics: it is no norm of another kind."""
        path = key.rpartition(".")[0]
        return any(f"{path}.{name}" in self.shapes for name in STATISTICS)

    def _has_others(self, row: Row, key: str, place: str) -> bool:
        """Whether another layer or norm of the block is there: without one, ``key`` is of a block that is fused."""
        start = f"{place}." if place else ""
        others = {_first_key(leaf, start) for leaf in leaves(row.part) if isinstance(leaf, (Layer, Norm))}
        return any(other in self.shapes for other in others - {key})

    def _take(self, row: Row, place: str) -> None:
        part = self._resolved(row.part, f"{place}." if place else "")
        assert part is not None
        layers = {f"{leaf.path}.weight" for leaf in leaves(part) if isinstance(leaf, Layer)}
        if layers & self.claimed:
            return
        trouble = fits(part, self.shapes)
        if trouble is not None:
            if row.ambiguous:
                return
            raise DamagedFileError(f"block {quoted(place or row.deploy)} of {self.family.name}: {trouble}")
        guesses = any(isinstance(leaf, Identity) and leaf.if_square for leaf in leaves(part))
        part = _without_missing_identities(part, is_square(part, self.shapes))
        self.claimed |= layers
        target = ".".join(name for name in (place, row.deploy) if name)
        sources, removed = self._keys(part)
        self.blocks.append(FamilyBlock(place or target, part, target, sources, removed, guesses))

    def _resolved(self, part: Part, place: str) -> Part | None:
        """Return ``part`` with whole keys; None for an optional one that is not there."""
        if isinstance(part, Maybe):
            first = next(leaves(part.part))
            return self._resolved(part.part, place) if _first_key(first, place) in self.shapes else None
        if isinstance(part, Each):
            raise AssertionError("an Each stands in a sum")
        if isinstance(part, Chain):
            return Chain(tuple(p for p in (self._resolved(q, place) for q in part.parts) if p is not None))
        if isinstance(part, Sum):
            branches = [p for q in part.branches for p in self._branches(q, place)]
            return replace(part, branches=tuple(branches))
        if isinstance(part, Minus):
            inner = self._resolved(part.part, place)
            return None if inner is None else Minus(inner)
        return self._leaf(part, place)

    def _branches(self, part: Part, place: str) -> list[Part]:
        found = [self._resolved(p, place) for p in (self._each(part, place) if isinstance(part, Each) else (part,))]
        return [p for p in found if p is not None]

    def _each(self, part: Each, place: str) -> Iterator[Part]:
        first = _first_key(next(leaves(part.part)), place)
        pattern = re.compile(re.escape(first).replace(r"\*", r"(\d{1,6})"))
        matches = [pattern.fullmatch(key) for key in self._under(place)]
        numbers = sorted(tuple(map(int, match.groups())) for match in matches if match)
        if not numbers:
            raise _LacksError(first.replace("*", "0"))
        for chosen in numbers:
            yield _numbered(part.part, chosen)

    def _under(self, place: str) -> Iterator[str]:
        for index in range(bisect_left(self.names, place), len(self.names)):
            if not self.names[index].startswith(place):
                return
            yield self.names[index]

    def _leaf(self, part: Part, place: str) -> Part:
        if isinstance(part, (Layer, Norm)):
            path = f"{place}{part.path}"
            for name in ("weight",) if isinstance(part, Layer) else STATISTICS:
                self._require(f"{path}.{name}")
            return replace(part, path=path)
        if isinstance(part, (Scale, Shift)):
            self._require(f"{place}{part.key}")
            return replace(part, key=f"{place}{part.key}")
        return part

    def _require(self, key: str) -> None:
        if key not in self.shapes:
            raise _LacksError(key)

    def _keys(self, part: Part) -> tuple[tuple[str, ...], tuple[str, ...]]:
        sources: dict[str, None] = {}
        kept: set[str] = set()
        counters: list[str] = []
        for leaf in leaves(part):
            if isinstance(leaf, Layer):
                sources |= dict.fromkeys(k for k in (f"{leaf.path}.weight", f"{leaf.path}.bias") if k in self.shapes)
            elif isinstance(leaf, Norm):
                sources |= dict.fromkeys(k for name in NORM_KEYS if (k := f"{leaf.path}.{name}") in self.shapes)
                counters += [k for k in (f"{leaf.path}.{_COUNTER}",) if k in self.shapes]
            elif isinstance(leaf, (Scale, Shift)):
                sources[leaf.key] = None
                # Only a row of it is this block's: the tensor stays for the others.
                kept |= {leaf.key} if isinstance(leaf, Scale) and leaf.row is not None else set()
        return tuple(sources), tuple(k for k in (*sources, *counters) if k not in kept)

    def require_whole(self) -> None:
        """Raise for a block that no row could take though one of its layers is there."""
        for key, error in self.broken.items():
            if key not in self.claimed:
                raise error

    def result(self) -> Found:
        """Return what was found, blocks in the file's order."""
        blocks = sorted(self.blocks, key=lambda block: min(self.order[key] for key in block.sources))
        shared = Counter(block.name for block in blocks)
        blocks = [replace(b, name=b.target) if shared[b.name] > 1 else b for b in blocks]
        removed = {key for block in blocks for key in block.removed}
        targets = {f"{block.target}.{name}" for block in blocks for name in ("weight", "bias")}
        replaced = tuple(key for key in self.shapes if key in targets - removed)
        dead = tuple(key for key in self.shapes if key not in removed | targets and self._is_superseded(key))
        gone = removed | targets | set(dead)
        kept = tuple(key for key in self.shapes if key not in gone)
        alive = tuple(b for b in blocks if not self._is_superseded(f"{b.target}.weight"))
        return Found(self.family, alive, kept, dead, replaced, self._count_fused(targets))

    def _is_superseded(self, key: str) -> bool:
        """Whether ``key`` is of that one of two twin modules which the deploy form leaves out."""
        parts = key.split(".")
        plain = [part.removeprefix(self.family.twin) for part in parts]
        return any(
            plain[index] != parts[index] and ".".join((*parts[:index], plain[index])) in self.modules
            for index in range(len(parts) - 1)
        )

    @cached_property
    def modules(self) -> set[str]:
        """The paths of all modules, if the family has twins among them."""
        if not self.family.twin:
            return set()
        paths = {key.rpartition(".")[0] for key in self.names}
        return {".".join(path.split(".")[:depth]) for path in paths for depth in range(1, path.count(".") + 2)}

    def _count_fused(self, targets: set[str]) -> int:
        deploys = {row.deploy for row in self.family.rows if row.deploy}
        ends = tuple(f"{deploy}.weight" for deploy in deploys)
        return sum(
            key.endswith(ends)
            and key not in targets
            and key.removesuffix("weight") + "bias" in self.shapes
            and key.removesuffix("weight") + "running_var" not in self.shapes
            and any(key == end or key.endswith(f".{end}") for end in ends)
            for key in self.shapes
        )


def _trigger(part: Part) -> Callable[[str], str | None]:
    """Return a function that tells the place of the block whose first layer's weight has this key."""
    first = next(leaf for leaf in leaves(part) if isinstance(leaf, Layer))
    path = re.escape(f"{first.path}.weight").replace(r"\*", r"\d{1,6}")
    pattern = re.compile(rf"(?:(.*)\.)?{path}")

    def place(key: str) -> str | None:
        match = pattern.fullmatch(key)
        return None if match is None else match.group(1) or ""

    return place


def _first_key(leaf: Part, place: str) -> str:
    if isinstance(leaf, (Scale, Shift)):
        return f"{place}{leaf.key}"
    assert isinstance(leaf, (Layer, Norm))
    return f"{place}{leaf.path}.{'weight' if isinstance(leaf, Layer) else 'running_var'}"


def _numbered(part: Part, numbers: tuple[int, ...]) -> Part:
    """Return ``part`` with these numbers in place of the stars of its paths."""
    if isinstance(part, Chain):
        return Chain(tuple(_numbered(p, numbers) for p in part.parts))
    assert isinstance(part, (Layer, Norm))
    path = part.path
    for number in numbers:
        path = path.replace("*", str(number), 1)
    return replace(part, path=path)


def _without_missing_identities(part: Part, is_there: bool) -> Part:
    if isinstance(part, Sum):
        kept = [p for p in part.branches if is_there or not (isinstance(p, Identity) and p.if_square)]
        return replace(part, branches=tuple(_without_missing_identities(p, is_there) for p in kept))
    if isinstance(part, Chain):
        return Chain(tuple(_without_missing_identities(p, is_there) for p in part.parts))
    return part
