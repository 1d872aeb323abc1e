"""What a pickle says, as inert records: nothing in them has been looked up, made or called.

Plain values (``dict``, ``list``, ``tuple``, ``set``, text, bytes, numbers, ``None``) stand for themselves.
Records compare by identity, because a pickle may use one object in several places. They have slots, because a
pickle may make a million of them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class GlobalName:
    """A class or function that the pickle names."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Return the full dotted name."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class InstanceRecord:
    """An object made empty, and the state it is to be given; ``None`` until the pickle gives one.

    ``has_odd_state`` tells that the state was not one plain dict, which no module's is.
    """

    kind: GlobalName
    state: dict[object, object] | None = None
    has_odd_state: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class StorageRecord:
    """A run of elements kept elsewhere in the file under ``key``."""

    key: str
    dtype: str
    nbytes: int


@dataclass(frozen=True, eq=False, slots=True)
class TensorRecord:
    """A view of a storage; ``offset`` and ``stride`` count elements of ``dtype``."""

    storage: StorageRecord
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class ParameterRecord:
    """A tensor that a module lists among its parameters."""

    data: TensorRecord
    requires_grad: bool


@dataclass(frozen=True, eq=False, slots=True)
class TorchValue:
    """A value of torch that is not a tensor: ``kind`` is ``dtype``, ``device``, ``size`` or ``function``."""

    kind: str
    value: object


@dataclass(frozen=True, eq=False, slots=True)
class Foreign:
    """Stands for whatever a name that is not admitted would have made: what it was given is not kept.

    Beside the weights it does no harm. In the weights it is refused.
    """

    path: str


RECORDS = (GlobalName, InstanceRecord, StorageRecord, TensorRecord, ParameterRecord, TorchValue, Foreign)
