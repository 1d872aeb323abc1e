"""The weights inside a checkpoint: wrappers looked through, prefixes taken off, and both told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.errors import InputError

EMA_KEYS = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
PLAIN_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "params", "net", "weights", "module")
"""Entries that a training script keeps the weights under, in order of preference; an average (EMA) goes first."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers of a model (data parallel, compiled, Lightning) put in front of every key."""

_DEEPEST_WRAPPER = 5


@dataclass(frozen=True)
class Unwrapped:
    """What was found inside a checkpoint: a module or tensors by name, and sentences on how it was found."""

    content: nn.Module | dict[str, torch.Tensor]
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
        if isinstance(saved, nn.Module):
            return Unwrapped(saved, tuple(notes))
        if not isinstance(saved, Mapping):
            break
        if _is_weights(saved):
            break
        key = _preferred(saved)
        if key is None:
            break
        notes.append(_note(saved, key))
        saved = saved[key]
    return Unwrapped(_weights(saved, notes), tuple(notes))


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


def _preferred(saved: Mapping[str, object]) -> str | None:
    for key in (*EMA_KEYS, *PLAIN_KEYS):
        if isinstance(saved.get(key), (Mapping, nn.Module)) and saved[key]:
            return key
    return None


def _note(saved: Mapping[str, object], key: str) -> str:
    others = [k for k in (*EMA_KEYS, *PLAIN_KEYS) if k != key and isinstance(saved.get(k), (Mapping, nn.Module))]
    average = ", the averaged weights (EMA)" if key in EMA_KEYS else ""
    instead = f"; --state-key can choose {listed(others)} instead" if others else ""
    return f"looked inside the entry {key!r}{average}{instead}"


def _is_weights(saved: Mapping[str, object]) -> bool:
    return bool(saved) and all(isinstance(value, torch.Tensor) for value in saved.values())


def _weights(saved: object, notes: list[str]) -> dict[str, torch.Tensor]:
    if not isinstance(saved, Mapping):
        raise InputError(f"it holds a {quoted(type(saved).__name__)}", needed="a module, or tensors by name")
    tensors = {str(k): v.detach() for k, v in saved.items() if isinstance(v, torch.Tensor)}
    left_out = [k for k, v in saved.items() if not isinstance(v, torch.Tensor)]
    if not tensors:
        entries = listed(saved) or "none"
        raise InputError(
            f"it holds no weights; its entries are {entries}", hint="--state-key names the entry that holds them."
        )
    if left_out:
        notes.append(f"left out what is not a tensor: {listed(left_out)}")
    return _without_prefixes(tensors, notes)


def _without_prefixes(tensors: dict[str, torch.Tensor], notes: list[str]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` without any prefix that all keys have in common; a prefix is never cut out of the middle."""
    while True:
        # The averaging counter of torch.optim.swa_utils lies beside the prefixed weights.
        keys = [key for key in tensors if key != "n_averaged"]
        prefix = next((p for p in PREFIXES if keys and all(k.startswith(p) and k != p for k in keys)), None)
        if prefix is None:
            return tensors
        tensors = {key[len(prefix) :]: tensors[key] for key in keys}
        notes.append(f"took the prefix {prefix!r} off all {len(keys)} keys")
