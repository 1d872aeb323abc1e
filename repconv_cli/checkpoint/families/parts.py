"""What a block is put together from: the words in which :mod:`repconv_cli.checkpoint.families.table` is written.

Paths are relative to the block's own path. A ``*`` in a path stands for a number, and the part that holds it is there
once for each number that the file has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """``x ⋆ weight (+ bias)``: a convolution, or a linear layer; its weight's shape tells which.

    ``dilated``: the last number in its path is its dilation. ``transposed``: it is a transposed convolution.
    ``adds_identity``: its kernel is ``weight + identity``.
    """

    path: str
    dilated: bool = False
    transposed: bool = False
    adds_identity: bool = False


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode: ``gamma · (x - mean) / sqrt(var + eps) + beta``."""

    path: str


@dataclass(frozen=True)
class Scale:
    """``x · value``, one value for each channel or one for all; of ``sigmoid(value[row])`` where that is said."""

    key: str
    row: int | None = None
    sigmoid: bool = False


@dataclass(frozen=True)
class Shift:
    """``x + value``, one value for each channel."""

    key: str


@dataclass(frozen=True)
class Pool:
    """The average over a window as large as the block's kernel; zeros of the padding count."""


@dataclass(frozen=True)
class Identity:
    """``x``. It has no key: ``if_square`` says that it is there where a block has as many inputs as outputs."""

    if_square: bool = False


@dataclass(frozen=True)
class Chain:
    """One part after the other."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sum:
    """The sum of branches; with ``mean``, divided by their number."""

    branches: tuple[Part, ...]
    mean: bool = False


@dataclass(frozen=True)
class Minus:
    """A branch that is subtracted from the sum."""

    part: Part


@dataclass(frozen=True)
class Maybe:
    """A part that some blocks have and some have not: told by its keys."""

    part: Part


@dataclass(frozen=True)
class Each:
    """A branch for each number that its paths have in place of ``*``."""

    part: Part


Part = Layer | Norm | Scale | Shift | Pool | Identity | Chain | Sum | Minus | Maybe | Each


@dataclass(frozen=True)
class Row:
    """One kind of block: what it is made of, and the path of the convolution that its deploy form has instead.

    ``ambiguous``: other networks use these names for something else, so a block whose shapes do not fit is not one.
    """

    part: Part
    deploy: str
    ambiguous: bool = False


@dataclass(frozen=True)
class Family:
    """The blocks of one repository, and the keys by which its files are known.

    ``marks`` are patterns (``|`` between alternatives) that all match some key of a training checkpoint, ``fused`` the
    same for a file in deploy form; ``every`` is one that all keys match. ``twin`` is a prefix of a module's
    name: ``X.one2one_cv2`` is not in the deploy form where ``X.cv2`` is. ``prefix`` is the model's own first name,
    which must not be taken for a wrapper's.
    """

    name: str
    marks: tuple[str, ...]
    rows: tuple[Row, ...]
    fused: tuple[str, ...] = ()
    every: str = "*"
    eps: float = 1e-5
    twin: str = ""
    prefix: str = ""


def children(part: Part) -> tuple[Part, ...]:
    """Return the parts that ``part`` is made of."""
    if isinstance(part, Chain):
        return part.parts
    if isinstance(part, Sum):
        return part.branches
    return (part.part,) if isinstance(part, (Minus, Maybe, Each)) else ()


def leaves(part: Part) -> Iterator[Part]:
    """Yield the parts that are made of no others, in order."""
    inner = children(part)
    if not inner and not isinstance(part, (Chain, Sum)):
        yield part
    for child in inner:
        yield from leaves(child)
