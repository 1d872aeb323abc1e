"""The weights inside a checkpoint: wrappers looked through, prefixes taken off, and both told.

Works on records, before any tensor is made: what is not taken is never read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from repconv_cli.checkpoint.admitted import MODULE_WRAPPERS
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.checkpoint.records import (
    Foreign,
    GlobalName,
    InstanceRecord,
    ParameterRecord,
    StorageRecord,
    TensorRecord,
    TorchValue,
)
from repconv_cli.checkpoint.states import is_module_like
from repconv_cli.errors import InputError

EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
PLAIN_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "params", "net", "weights", "module")
"""Entries that a training script keeps the weights under, in order of preference; an average (EMA) goes first."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers of a model (data parallel, compiled, Lightning) put in front of every key."""

LIGHTNING = "pytorch-lightning_version"

_DEEPEST_WRAPPER = 5

T = TypeVar("T")
Tensor: TypeAlias = TensorRecord | ParameterRecord


@dataclass(frozen=True)
class Unwrapped:
    """What was found inside a checkpoint: a module or tensors by name, and sentences on how it was found."""

    content: InstanceRecord | dict[str, Tensor]
    notes: tuple[str, ...]


def unwrap(saved: object, state_key: str | None = None) -> Unwrapped:
    """Return the module or the weights in what a checkpoint saved.

    ``state_key`` names the entry to take instead of the preferred one; dots lead to an entry of an entry.

    Raises:
        InputError: there are none, or ``state_key`` names no entry; the entries that there are are listed.
    """
    notes: list[str] = []
    if state_key is not None:
        saved = _chosen(saved, state_key)
        notes.append(f"took the entry {quoted(state_key)}, as asked")
    for _ in range(_DEEPEST_WRAPPER):
        if isinstance(saved, InstanceRecord) and saved.kind.path in MODULE_WRAPPERS:
            saved = _wrapped(saved, notes)
            continue
        if not isinstance(saved, Mapping) or _is_weights(saved):
            break
        key = _preferred(saved)
        if key is None:
            break
        notes += _notes(saved, key)
        saved = saved[key]
    if isinstance(saved, InstanceRecord):
        return Unwrapped(saved, tuple(notes))
    return Unwrapped(_weights(saved, notes), tuple(notes))


def without_prefixes(tensors: dict[str, T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """Return ``tensors`` without any prefix that all keys have in common, and the prefixes in order.

    A prefix is never cut out of the middle.

    >>> without_prefixes({"module.model.a": 1, "module.model.b": 2})
    ({'a': 1, 'b': 2}, ('module.', 'model.'))
    """
    prefixes: list[str] = []
    while True:
        # The averaging counter of torch.optim.swa_utils lies beside the prefixed weights.
        keys = [key for key in tensors if key != "n_averaged"]
        prefix = next((p for p in PREFIXES if keys and all(k.startswith(p) and k != p for k in keys)), None)
        if prefix is None:
            return tensors, tuple(prefixes)
        tensors = {key[len(prefix) :]: tensors[key] for key in keys}
        prefixes.append(prefix)


def prefix_notes(prefixes: Iterable[str], count: int) -> tuple[str, ...]:
    """Return the sentences that tell of prefixes taken off ``count`` keys."""
    return tuple(f"took the prefix {prefix!r} off all {count} keys" for prefix in prefixes)


def described(value: object) -> str:
    """Return what a record is, in a few words.

    >>> described(Foreign("argparse.Namespace")), described({}), described(None)
    ('argparse.Namespace', 'dict', 'None')
    """
    if isinstance(value, Foreign):
        return quoted(value.path)
    if isinstance(value, (InstanceRecord,)):
        return quoted(value.kind.path)
    if isinstance(value, GlobalName):
        return f"the name {quoted(value.path)}"
    if isinstance(value, TorchValue):
        return f"torch {value.kind}"
    if isinstance(value, (TensorRecord, ParameterRecord, StorageRecord)):
        return "tensor"
    return "None" if value is None else type(value).__name__


def _chosen(saved: object, state_key: str) -> object:
    found = saved
    # An entry whose own name holds dots is taken whole before it is taken apart.
    parts = [state_key] if isinstance(saved, Mapping) and state_key in saved else state_key.split(".")
    for part in parts:
        if not isinstance(found, Mapping) or part not in found:
            entries = listed(found) if isinstance(found, Mapping) else "none"
            raise InputError(f"there is no entry {quoted(state_key)}", needed=f"one of {entries}")
        found = found[part]
    return found


def _wrapped(wrapper: InstanceRecord, notes: list[str]) -> object:
    parts = (wrapper.state or {}).get("_modules")
    name = MODULE_WRAPPERS[wrapper.kind.path]
    if not isinstance(parts, dict) or name not in parts:
        raise InputError(f"it holds a {wrapper.kind.name} without a model in it")
    notes.append(f"looked inside the {wrapper.kind.name} around the module")
    return parts[name]


def _preferred(saved: Mapping[object, object]) -> str | None:
    return next((key for key in (*EMA_KEYS, *PLAIN_KEYS) if _holds_weights(saved.get(key))), None)


def _holds_weights(value: object, depth: int = 0) -> bool:
    if isinstance(value, InstanceRecord):
        return is_module_like(value)
    if not isinstance(value, Mapping) or depth > _DEEPEST_WRAPPER:
        return False
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_weights(value.get(key), depth + 1) for key in (*EMA_KEYS, *PLAIN_KEYS)
    )


def _notes(saved: Mapping[object, object], key: str) -> list[str]:
    others = [k for k in (*EMA_KEYS, *PLAIN_KEYS) if k != key and _holds_weights(saved.get(k))]
    average = ", the averaged weights (EMA)" if key in EMA_KEYS else ""
    instead = f"; --state-key can choose {listed(others)} instead" if others else ""
    lightning = " of a Lightning checkpoint" if LIGHTNING in saved else ""
    notes = [f"looked inside the entry {key!r}{lightning}{average}{instead}"]
    unread = [name for name in EMA_KEYS if isinstance(saved.get(name), (Foreign, InstanceRecord))]
    if unread and key not in EMA_KEYS:
        notes.append(f"the averaged weights (EMA) in {unread[0]!r} are a {described(saved[unread[0]])}, and not read")
    left = [_entry(name, value) for name, value in saved.items() if name != key and name not in others]
    if left:
        notes.append(f"not needed and not read: {listed(left)}")
    return notes


def _entry(name: object, value: object) -> str:
    return f"{name} ({described(value)})" if isinstance(value, (Foreign, InstanceRecord)) else str(name)


def _is_weights(saved: Mapping[object, object]) -> bool:
    return bool(saved) and all(isinstance(value, Tensor) for value in saved.values())


def _weights(saved: object, notes: list[str]) -> dict[str, Tensor]:
    if not isinstance(saved, Mapping):
        raise InputError(f"it holds a {described(saved)}", needed="a module, or tensors by name")
    tensors = {str(k): v for k, v in saved.items() if isinstance(v, Tensor)}
    left_out = {str(k): v for k, v in saved.items() if not isinstance(v, Tensor)}
    if not tensors:
        entries = listed(saved) or "none"
        raise InputError(
            f"it holds no weights; its entries are {entries}", hint="--state-key names the entry that holds them."
        )
    foreign = [f"{key} is a {described(value)}" for key, value in left_out.items() if isinstance(value, Foreign)]
    if foreign:
        raise InputError(f"among its weights, {listed(foreign)}", needed="tensors")
    if left_out:
        notes.append(f"left out what is not a tensor: {listed(left_out)}")
    return tensors
