"""Checks on the state that a pickled module is to be given, before any module is made."""

from __future__ import annotations

from collections.abc import Sequence

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.records import Foreign, InstanceRecord, ParameterRecord, TensorRecord
from repconv_cli.errors import DamagedFileError, UnsafeFileError

_HINT = "Save model.state_dict() instead, and give --arch file.py:callable."

_TABLES = ("_modules", "_parameters", "_buffers")

# Attributes of torch.nn.Module that decide what runs when the module is called.
_CALLED = frozenset(["forward", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "_slow_forward", "_apply"])


_TABLES = ("_modules", "_parameters", "_buffers")


def check_states(instances: Sequence[InstanceRecord]) -> None:
    """Check the state of every module in a pickle.

    Raises:
        UnsafeFileError: as :func:`check_state`.
        DamagedFileError: as :func:`check_state`; or two modules share a state or a table in it, which no module does,
            and which would be read as often as there are modules.
    """
    states = [instance.state for instance in instances if instance.state is not None]
    _require_distinct("state", states)
    for table in _TABLES:
        _require_distinct(f"table of {table[1:]}", [state.get(table) for state in states])
    for instance in instances:
        check_state(instance)


def _require_distinct(what: str, values: Sequence[object]) -> None:
    places = [id(value) for value in values if isinstance(value, dict)]
    if len(set(places)) != len(places):
        raise DamagedFileError(f"two of its modules share one {what}")


def check_state(instance: InstanceRecord) -> None:
    """Check that a module's state holds sub-modules, parameters, buffers and plain attributes, and no code.

    Whether an attribute hides a method of the class can only be told with the class at hand:
    :func:`repconv_cli.checkpoint.rebuild.rebuild` checks that.

    Raises:
        UnsafeFileError: it holds hooks, or replaces what runs when the module is called.
        DamagedFileError: it lacks what every module has, or has it with another type.
    """
    kind, state = quoted(instance.kind.path), instance.state
    if state is None:
        raise DamagedFileError(f"a {kind} is never given its state")
    if instance.has_odd_state:
        raise DamagedFileError(f"a {kind} is given a state that is not one plain dict")
    for key, value in state.items():
        if not isinstance(key, str):
            raise DamagedFileError(f"a {kind} has an attribute whose name is not text")
        if "hook" in key and value and not (key == "_is_full_backward_hook" and value is True):
            raise UnsafeFileError(f"a {kind} comes with hooks ({quoted(key)}), which are code", hint=_HINT)
        if key in _CALLED or key.startswith("__"):
            raise UnsafeFileError(f"a {kind} replaces its own {quoted(key)}", hint=_HINT)
    _check_table(kind, state, "_modules", (InstanceRecord,))
    _check_table(kind, state, "_parameters", (ParameterRecord, TensorRecord))
    _check_table(kind, state, "_buffers", (ParameterRecord, TensorRecord))
    if instance.kind.module == "torch.nn.modules.rnn" and not _is_borne_out(state.get("num_layers", 1), state):
        raise DamagedFileError(f"a {kind} claims {quoted(state['num_layers'])} layers, and has no weights for them")
    if not isinstance(state.get("training", True), bool):
        raise DamagedFileError(f"a {kind} has a training flag that is neither true nor false")


def _is_borne_out(layers: object, state: dict[object, object]) -> bool:
    """Whether a recurrent module has a parameter or more for each layer: it makes a table of that length at load."""
    parameters = state["_parameters"]
    assert isinstance(parameters, dict)
    return isinstance(layers, int) and layers <= max(1, len(parameters))


def instances_in(root: InstanceRecord) -> list[InstanceRecord]:
    """Return ``root`` and every module below it, each once: those in its tables of modules, and those in attributes.

    An object in an attribute that has no such tables is no module; it is not listed, and never made.
    """
    found: dict[int, InstanceRecord] = {id(root): root}
    seen: set[int] = set()
    open_ends: list[tuple[object, bool]] = [(root, True)]
    while open_ends:
        value, must_be_module = open_ends.pop()
        if isinstance(value, InstanceRecord):
            if must_be_module or is_module_like(value):
                found[id(value)] = value
            if (id(value) in seen) or not (value.state and id(value) in found):
                continue
            seen.add(id(value))
            open_ends += [(item, True) for item in _items(value.state.get("_modules"))]
            open_ends += [(item, False) for key, item in value.state.items() if key != "_modules"]
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            open_ends += [(item, False) for item in _items(value)]
    return list(found.values())


def is_module_like(instance: InstanceRecord) -> bool:
    """Whether an object was saved with what every module has."""
    return instance.state is not None and all(name in instance.state for name in _TABLES)


def has_foreign_part(instance: InstanceRecord) -> bool:
    """Whether a module's own parts (not its other attributes) hold something that is not admitted."""
    tables = [(instance.state or {}).get(table) for table in _TABLES]
    return any(isinstance(item, Foreign) for table in tables for item in (table, *_items(table)))


def _items(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _check_table(kind: str, state: dict[object, object], table: str, allowed: tuple[type, ...]) -> None:
    entries = state.get(table)
    if not isinstance(entries, dict):
        raise DamagedFileError(f"a {kind} has no table of {table[1:]}, so it is not a module")
    for name, value in entries.items():
        if not isinstance(name, str) or not name or "." in name or not name.isprintable():
            raise DamagedFileError(f"a {kind} has an entry with an unusable name in its {table[1:]}: {quoted(name)}")
        if value is not None and not isinstance(value, allowed):
            raise DamagedFileError(f"{quoted(name)} in the {table[1:]} of a {kind} is of another type")
