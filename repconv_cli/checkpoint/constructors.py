"""What may be named, made and called in a checkpoint's pickle, and what each of these means as a record."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence

from repconv_cli.checkpoint import admitted
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
from repconv_cli.errors import DamagedFileError, InputError

MOST_AXES = 25
MOST_EXPANDED = 1 << 22
"""Elements that all expanded tensors of a file may have together beyond what their storages hold."""

MOST_ARGUMENTS = 2_000_000
"""Items and characters in the arguments of all calls of a file together: a pickle can hand one list to each of them."""

_DEVICE = re.compile(r"[a-z]{1,16}(:\d{1,3})?")


class Constructors:
    """The meaning of names, calls and states, with a list of all that was refused.

    ``available_bytes`` is the size of the file: no storage may claim more.
    """

    def __init__(self, trusted: Sequence[str], available_bytes: int) -> None:
        self.instances: list[InstanceRecord] = []
        self.storages: dict[str, StorageRecord] = {}
        self.foreign: dict[str, str] = {}
        self._trusted = tuple(trusted)
        self._available_bytes = available_bytes
        self._expanded_left = MOST_EXPANDED
        self._arguments_left = MOST_ARGUMENTS

    def named(self, name: GlobalName) -> object:
        """Return what a name stands for: itself if it is admitted, a torch value, or a refusal's placeholder."""
        key = (name.module, name.name)
        if name.module == "torch" and name.name in admitted.DTYPE_NAMES:
            return TorchValue("dtype", admitted.DTYPE_NAMES[name.name])
        if key in admitted.PLAIN_FUNCTIONS:
            return TorchValue("function", key)
        if key in admitted.UNSUPPORTED_TENSORS:
            raise InputError(
                f"it holds {admitted.UNSUPPORTED_TENSORS[key]}", needed="ordinary dense tensors of numbers"
            )
        if key in _CALLS or key in _PASSIVE or _storage_dtype(name) is not None:
            return name
        if admitted.is_module_class(name.module, name.name, self._trusted):
            return name
        return self._refuse(name.path)

    def called(self, function: object, arguments: tuple[object, ...]) -> object:
        """Return the record of a call with the file's arguments, or a refusal's placeholder."""
        if isinstance(function, Foreign):
            return function
        if isinstance(function, GlobalName):
            call = _CALLS.get((function.module, function.name))
            if call is not None:
                self._arguments_left -= _extent(arguments) + sum(_extent(argument) for argument in arguments)
                if self._arguments_left < 0:
                    raise InputError(
                        "its pickle calls functions with too many values in all", needed=f"at most {MOST_ARGUMENTS}"
                    )
                return call(self, arguments)
            return self._refuse(function.path, "called with the file's arguments")
        return self._refuse(_title(function), "called with the file's arguments")

    def made(self, kind: object, arguments: object) -> object:
        """Return the record of an object made without calling its class."""
        if isinstance(kind, Foreign):
            return kind
        if not isinstance(kind, GlobalName) or not self._is_module_class(kind):
            if isinstance(kind, GlobalName) and kind.path == "collections.OrderedDict" and arguments == ():
                return OrderedDict()
            return self._refuse(_title(kind), "made")
        if arguments != ():
            return self._refuse(kind.path, "made with the file's arguments")
        instance = InstanceRecord(kind)
        self.instances.append(instance)
        return instance

    def given_state(self, target: object, state: object) -> None:
        """Note the state that an object is given. What it holds is checked once the whole pickle is read."""
        if isinstance(target, InstanceRecord):
            if not isinstance(state, dict) or target.state is not None:
                target.has_odd_state = True
            target.state = state if isinstance(state, dict) else {}
        elif isinstance(target, OrderedDict):
            # The attribute of a state dict, `_metadata`: layer versions, not weights.
            if not isinstance(state, dict):
                raise DamagedFileError("a dict is given a state that is not a dict")
        elif not isinstance(target, Foreign):
            self._refuse(_title(target), "given a state")

    def persistent(self, identity: object) -> object:
        """Return the storage (or, in old files, the class) that a persistent id refers to."""
        if not isinstance(identity, tuple) or not identity or identity[0] not in ("storage", "module"):
            raise DamagedFileError("its pickle refers to data by something else than a storage")
        if identity[0] == "module":
            # ("module", class, its source file, its source text): old files keep the code beside the class.
            return identity[1]
        kind, key, _, count = identity[1:5]
        if len(identity) > 5 and identity[5] is not None:
            raise InputError("a storage is a window into another", hint="Save it again with a current torch.")
        if isinstance(kind, Foreign):
            return kind
        return self._storage(kind, key, count)

    def _storage(self, kind: object, key: object, count: object) -> StorageRecord:
        dtype = _storage_dtype(kind) if isinstance(kind, GlobalName) else None
        if dtype is None or not isinstance(key, str) or not _is_count(count):
            raise DamagedFileError("a storage is not described by a type, a key and a size")
        assert isinstance(count, int)
        nbytes = count * admitted.ITEM_BYTES[dtype]
        if nbytes > self._available_bytes:
            raise DamagedFileError(
                f"storage {quoted(key)} claims {nbytes} bytes", needed=f"at most the file's {self._available_bytes}"
            )
        known = self.storages.get(key)
        if known is not None and (known.nbytes, known.dtype) != (nbytes, dtype):
            raise DamagedFileError(f"storage {quoted(key)} is described in two ways")
        return self.storages.setdefault(key, StorageRecord(key, dtype, nbytes))

    def _is_module_class(self, name: GlobalName) -> bool:
        return admitted.is_module_class(name.module, name.name, self._trusted)

    def _refuse(self, path: str, deed: str = "") -> Foreign:
        self.foreign[path] = deed or self.foreign.get(path, "")
        return Foreign(path)

    # -- the calls that have a meaning ---------------------------------------------------------------------------

    def _tensor(self, arguments: tuple[object, ...], dtype: str | None = None) -> TensorRecord | Foreign:
        storage, offset, size, stride, requires_grad, hooks, *metadata = arguments
        if isinstance(storage, Foreign):
            return storage
        if not isinstance(storage, StorageRecord) or not isinstance(requires_grad, bool):
            raise DamagedFileError("a tensor is not described by a storage, an offset, a size and a stride")
        _require_no_hooks(hooks)
        if metadata and metadata[0]:
            raise InputError("it holds a conjugated or negated view", hint="Save tensor.resolve_conj().resolve_neg().")
        size, stride = _counts(size), _counts(stride)
        if not _is_count(offset) or len(size) != len(stride) or len(size) > MOST_AXES:
            raise DamagedFileError("a tensor's offset, size and stride do not fit together")
        assert isinstance(offset, int)
        record = TensorRecord(storage, dtype or storage.dtype, offset, size, stride, requires_grad)
        self._require_bytes(record)
        return record

    def _require_bytes(self, tensor: TensorRecord) -> None:
        """A tensor reads inside its storage, and shows no more elements than it, unless they are few."""
        held = tensor.storage.nbytes // admitted.ITEM_BYTES[tensor.dtype]
        count = math.prod(tensor.size)
        reach = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True)) + 1
        where = f"a tensor of size {quoted(tensor.size)} on storage {quoted(tensor.storage.key)}"
        if count and reach > held:
            raise DamagedFileError(f"{where} needs {reach} elements, which holds {held}")
        if count > held:
            self._expanded_left -= count - held
            if self._expanded_left < 0:
                raise DamagedFileError(f"{where} claims {count} elements, which holds {held}")

    def _tensor_with_dtype(self, arguments: tuple[object, ...]) -> TensorRecord | Foreign:
        *common, dtype = arguments[:7]
        if len(arguments) not in (7, 8) or not isinstance(dtype, TorchValue) or dtype.kind != "dtype":
            raise DamagedFileError("a tensor's dtype is not given as one")
        return self._tensor((*common, *arguments[7:]), str(dtype.value))

    def _tensor_with_attributes(self, arguments: tuple[object, ...]) -> object:
        function, kind, inner, _attributes = arguments
        if not isinstance(kind, GlobalName) or kind.path not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return self._refuse(_title(kind), "made")
        if not isinstance(inner, tuple):
            raise DamagedFileError("a tensor with attributes is not described by a function and its arguments")
        made = self.called(function, inner)
        if not isinstance(made, (TensorRecord, ParameterRecord, Foreign)):
            raise DamagedFileError("a tensor with attributes is not a tensor")
        return made

    def _parameter(self, arguments: tuple[object, ...]) -> object:
        # A fourth argument holds Python attributes of the parameter; they take no part in any computation.
        data, requires_grad, hooks, *_attributes = arguments
        if isinstance(data, Foreign):
            return data
        if not isinstance(data, TensorRecord) or not isinstance(requires_grad, bool):
            raise DamagedFileError("a parameter is not described by a tensor")
        _require_no_hooks(hooks)
        return ParameterRecord(data, requires_grad)

    def _ordered_dict(self, arguments: tuple[object, ...]) -> object:
        result: OrderedDict[object, object] = OrderedDict()
        # Protocol 0 and 1 of Python 2 give the items as one list of pairs.
        for pair in arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list) else ():
            key, value = pair
            if not isinstance(key, (str, int)):
                raise DamagedFileError("a dict's key is neither text nor a number")
            result[key] = value
        return result

    def _set(self, arguments: tuple[object, ...]) -> object:
        items = arguments[0] if arguments else []
        if not isinstance(items, list) or not all(isinstance(item, (str, int)) for item in items):
            return Foreign("builtins.set")
        return set(items)

    def _size(self, arguments: tuple[object, ...]) -> object:
        return TorchValue("size", _counts(arguments[0]))

    def _device(self, arguments: tuple[object, ...]) -> object:
        text = ":".join(str(part) for part in arguments)
        if not _DEVICE.fullmatch(text):
            raise DamagedFileError(f"the device {quoted(text)} is not one")
        return TorchValue("device", text)

    def _encoded(self, arguments: tuple[object, ...]) -> object:
        text, encoding = arguments
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise DamagedFileError("bytes are not given as latin-1 text")
        return text.encode("latin-1")

    def _copied(self, arguments: tuple[object, ...]) -> object:
        # How protocols 0 and 1 make an object without calling its class.
        kind, base, state = arguments
        if isinstance(kind, Foreign):
            return kind
        if not isinstance(base, GlobalName) or base.path != "builtins.object" or state is not None:
            return self._refuse(_title(kind), "made with the file's arguments")
        return self.made(kind, ())


_CALLS: dict[tuple[str, str], Callable[[Constructors, tuple[object, ...]], object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): Constructors._tensor,
    ("torch._utils", "_rebuild_tensor_v3"): Constructors._tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): Constructors._parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): Constructors._parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): Constructors._tensor_with_attributes,
    ("collections", "OrderedDict"): Constructors._ordered_dict,
    ("builtins", "set"): Constructors._set,
    ("torch", "Size"): Constructors._size,
    ("torch", "device"): Constructors._device,
    ("_codecs", "encode"): Constructors._encoded,
    ("copyreg", "_reconstructor"): Constructors._copied,
}

# Names that appear as arguments of those calls, and do nothing on their own.
_PASSIVE = frozenset([("builtins", "object"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter")])


def _storage_dtype(name: GlobalName) -> str | None:
    if (name.module, name.name) == admitted.UNTYPED_STORAGE:
        return "uint8"
    return admitted.STORAGE_DTYPES.get(name.name) if name.module in ("torch", "torch.cuda") else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _extent(value: object) -> int:
    """Return how many parts a value has that a call may have to look at."""
    inner = value.value if isinstance(value, TorchValue) else value
    return len(inner) if isinstance(inner, (str, bytes, list, tuple, dict)) else 1


def _counts(value: object) -> tuple[int, ...]:
    inner = value.value if isinstance(value, TorchValue) and value.kind == "size" else value
    if not isinstance(inner, (tuple, list)) or not all(_is_count(item) for item in inner):
        raise DamagedFileError("a size or stride is not a tuple of whole numbers")
    return tuple(int(item) for item in inner)


def _require_no_hooks(hooks: object) -> None:
    if hooks is not None and hooks != {}:
        raise DamagedFileError("a tensor comes with hooks, which are code")


def _title(value: object) -> str:
    if isinstance(value, GlobalName):
        return value.path
    if isinstance(value, InstanceRecord):
        return value.kind.path
    if isinstance(value, TorchValue) and isinstance(value.value, tuple):
        return ".".join(str(part) for part in value.value)
    return f"a {type(value).__name__}"
