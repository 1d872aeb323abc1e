"""Tensors and modules made from checked records. This is the only place where a class named in a file is looked up."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from repconv_cli.checkpoint.admitted import is_module_class
from repconv_cli.checkpoint.importing import library_code
from repconv_cli.checkpoint.quoting import quoted
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
from repconv_cli.checkpoint.unread import Unread
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError

DEEPEST = 200
"""Levels of nesting; each level of modules takes three."""

MOST_WRITTEN_OUT = 4_000_000
"""Values in a list, tuple or dict, counted as often as they occur: lists that hold the one below twice double each
time, and whoever shows or compares such a list never ends."""

FEW_PATHS, MOST_USES = 2_000, 64
"""So many places may modules have in one another, and so many more for each module: one may be used in several."""

FEW_ATTRIBUTES = 50_000
"""Values that modules may have in lists and tuples, and 64 more for each module: an export looks at all of them."""

ReadStorage = Callable[[StorageRecord], torch.Tensor]
"""Returns a storage's bytes as ``uint8``, exactly as many as it has, or raises."""


class Rebuilder:
    """Makes each record once, so that what is shared in the file is shared in the result.

    ``read`` supplies the bytes of a storage: every byte of a tensor comes from there. ``unread`` lists the classes
    of objects that are not made, and for which :class:`Unread` stands.
    """

    def __init__(self, read: ReadStorage, trusted: Sequence[str] = ()) -> None:
        self._read = read
        self._trusted = tuple(trusted)
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, object] = {}
        self._open: set[int] = set()
        self._written_out: dict[int, int] = {}
        self._modules = self._attributes = 0
        self._classes: dict[tuple[str, str], type[nn.Module]] = {}
        self.unread: dict[str, None] = {}

    def rebuild(self, record: object, depth: int = 0) -> object:
        """Return the value that ``record`` describes.

        Raises:
            DamagedFileError: it contains itself, is nested too deeply, or its bytes are not in the file.
            UnsafeFileError: a module has an attribute that hides one of its methods.
            InputError: a class is not installed, or is not a class of modules.
        """
        if isinstance(record, (str, bytes, int, float)) or record is None:
            return record
        key = id(record)
        if key in self._made:
            return self._made[key]
        if key in self._open:
            raise DamagedFileError("its pickle holds an object that contains itself")
        if depth > DEEPEST:
            raise DamagedFileError(f"its pickle is nested more than {DEEPEST} levels deep")
        self._open.add(key)
        value = self._make(record, depth + 1)
        self._open.discard(key)
        self._made[key] = value
        self._written_out[key] = self._count(record)
        return value

    def _count(self, record: object) -> int:
        """Return how many values a record comes to, shared ones counted each time; of a module, the modules in it."""
        parts = _parts(record)
        count = 1 + sum(self._written_out.get(id(part), 1) for part in parts)
        if isinstance(record, InstanceRecord) and is_module_like(record):
            self._count_module(record, count)
        if count > MOST_WRITTEN_OUT:
            raise DamagedFileError(f"its pickle repeats values so often that they come to more than {MOST_WRITTEN_OUT}")
        return count

    def _count_module(self, record: InstanceRecord, places: int) -> None:
        self._modules += 1
        tables = ("_modules", "_parameters", "_buffers")
        plain = [value for name, value in _state(record).items() if name not in tables]
        self._attributes += sum(
            self._written_out.get(id(value), 1) for value in plain if isinstance(value, (list, tuple, dict))
        )
        if places > FEW_PATHS + MOST_USES * self._modules:
            raise DamagedFileError(f"its {self._modules} modules hold one another in {places} places")
        if self._attributes > FEW_ATTRIBUTES + MOST_USES * self._modules:
            raise DamagedFileError(f"its {self._modules} modules have {self._attributes} values in lists")

    def _make(self, record: object, depth: int) -> object:
        if isinstance(record, TensorRecord):
            return self._tensor(record).requires_grad_(record.requires_grad)
        if isinstance(record, ParameterRecord):
            return nn.Parameter(self._tensor(record.data), record.requires_grad)
        if isinstance(record, InstanceRecord) and is_module_like(record):
            return self._module(record, depth)
        if isinstance(record, (InstanceRecord, Foreign, GlobalName)):
            return self._stand_in(record)
        if isinstance(record, TorchValue):
            return _torch_value(record)
        if isinstance(record, dict):
            kind = OrderedDict if isinstance(record, OrderedDict) else dict
            return kind((self._key(key, depth), self.rebuild(value, depth)) for key, value in record.items())
        if isinstance(record, (list, tuple)):
            return type(record)([self.rebuild(item, depth) for item in record])
        if isinstance(record, set):
            return {self._key(item, depth) for item in record}
        raise DamagedFileError(f"its pickle ends in a {quoted(type(record).__name__)}, which is no value of a model")

    def _key(self, key: object, depth: int) -> object:
        return tuple(self.rebuild(part, depth) for part in key) if isinstance(key, tuple) else self.rebuild(key, depth)

    def _stand_in(self, record: InstanceRecord | Foreign | GlobalName) -> Unread:
        path = record.kind.path if isinstance(record, InstanceRecord) else record.path
        self.unread[path] = None
        return Unread(path)

    def _tensor(self, record: TensorRecord) -> torch.Tensor:
        storage = self._storages.get(id(record.storage))
        if storage is None:
            storage = self._storages[id(record.storage)] = self._read(record.storage).untyped_storage()
        empty = torch.empty(0, dtype=getattr(torch, record.dtype))
        return empty.set_(storage, record.offset, record.size, record.stride)

    def _module(self, record: InstanceRecord, depth: int) -> nn.Module:
        kind = self._class(record.kind)
        assert record.state is not None
        for name, value in record.state.items():
            # A text says what kind of layer this is; nothing calls nn.Module.type, which it hides.
            if name != "type" or not isinstance(value, str):
                _require_no_method(kind, str(name))
        state = {name: self.rebuild(value, depth) for name, value in record.state.items()}
        made: nn.Module = kind.__new__(kind)
        try:
            # torch.nn's own classes fill in here what older versions did not save.
            cast(Any, made).__setstate__(state)
        except Exception as error:  # noqa: BLE001 - the state is not what this class saves
            raise DamagedFileError(
                f"the state of a {quoted(record.kind.path)} does not fit its class ({type(error).__name__})"
            ) from None
        return made

    def _class(self, name: GlobalName) -> type[nn.Module]:
        key = (name.module, name.name)
        if key not in self._classes:
            self._classes[key] = find_module_class(name, self._trusted)
        return self._classes[key]


def _state(record: InstanceRecord) -> dict[object, object]:
    assert record.state is not None
    return record.state


def _parts(record: object) -> Iterable[object]:
    if isinstance(record, InstanceRecord):
        modules = (record.state or {}).get("_modules")
        return modules.values() if isinstance(modules, dict) else ()
    if isinstance(record, dict):
        return record.values()
    return record if isinstance(record, (list, tuple)) else ()


def find_module_class(name: GlobalName, trusted: Sequence[str] = ()) -> type[nn.Module]:
    """Return the class of modules that an admitted name stands for.

    Modules of ``torch.nn`` are taken from what torch has imported already; only this package and packages that
    the user trusts are imported.

    Raises:
        InputError: there is no such class here, or it is not a class of modules from where it claims to be.
    """
    found = getattr(_python_module(name.module), name.name, None)
    # A package may re-export a class from elsewhere, which nobody vouched for.
    if (
        isinstance(found, type)
        and issubclass(found, nn.Module)
        and is_module_class(found.__module__, found.__name__, trusted)
    ):
        return found
    raise InputError(
        f"its pickle needs {quoted(name.path)}, which is not a module class of this installation",
        hint="Install the version that saved it, or save model.state_dict() and give --arch file.py:callable.",
    )


def _python_module(name: str) -> ModuleType | None:
    if name.startswith("torch."):
        return sys.modules.get(name)
    try:
        with library_code():
            return importlib.import_module(name)
    except ImportError:
        return None


def _require_no_method(kind: type[nn.Module], name: str) -> None:
    on_class = inspect.getattr_static(kind, name, None)
    if callable(on_class) or hasattr(type(on_class), "__get__"):
        raise UnsafeFileError(
            f"a {quoted(kind.__module__)}.{quoted(kind.__name__)} hides its own {quoted(name)}",
            hint="Save model.state_dict() instead, and give --arch file.py:callable.",
        )


def _torch_value(record: TorchValue) -> object:
    if record.kind == "dtype":
        return getattr(torch, str(record.value))
    if record.kind == "size":
        assert isinstance(record.value, tuple)
        return torch.Size(record.value)
    if record.kind == "device":
        return _device(str(record.value))
    assert isinstance(record.value, tuple)
    module, name = record.value
    return getattr(sys.modules[module], name)


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise DamagedFileError(f"the device {quoted(text)} is not one that torch knows") from None
