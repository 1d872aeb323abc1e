"""The tensors of a TorchScript archive, by the names that ``state_dict()`` of its module gives.

Its graph is code, and stays unread but for two lists in each class: which attributes are parameters and which are
buffers. They are looked up in the text by a pattern; nothing in the archive is compiled or run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from repconv_cli.checkpoint.archive import Archive
from repconv_cli.checkpoint.pickles import MOST_PICKLE_BYTES, PickleReader
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.reading import FileBytes
from repconv_cli.checkpoint.records import GlobalName, InstanceRecord, ParameterRecord, TensorRecord
from repconv_cli.checkpoint.torch_file import SavedRecords, check_storages, record_folder, storages_in
from repconv_cli.errors import DamagedFileError, InputError

if TYPE_CHECKING:
    from repconv_cli.checkpoint.wrappers import Tensor

SCRIPT_CLASSES = "__torch__"
"""What the names of all classes in an archive begin with."""

MOST_VISITS = 100_000
"""Places of all modules in one archive: a module used twice in each of many levels would have no end of names."""

_DEEPEST = 200
_MOST_CODE_BYTES = 16 << 20
_NAME = r'"[^"\\\n]{1,500}"'
_CLASS = re.compile(rf"^class (\w+)\(Module\):\n((?:  __\w+__ = \[(?:{_NAME}, )*\]\n)*)", re.MULTILINE)
_LIST = re.compile(rf"^  __(parameters|buffers)__ = \[((?:{_NAME}, )*)\]$", re.MULTILINE)


def open_script(handle: BinaryIO) -> SavedRecords:
    """Return the records of a TorchScript archive's parameters and buffers, by name.

    Raises:
        UnsafeFileError: its pickle names something that would act on the machine.
        DamagedFileError: the archive contradicts itself.
        InputError: it holds no parameters, or keeps them in another way (quantized, frozen).
    """
    archive = Archive(handle)
    folder = record_folder(archive)
    reader = PickleReader((SCRIPT_CLASSES,), handle.seek(0, 2))
    root = reader.read(BytesIO(archive.read(f"{folder}data.pkl", MOST_PICKLE_BYTES)))
    if not isinstance(root, InstanceRecord):
        raise InputError("the TorchScript archive holds no module", hint="Save it again with torch.jit.save.")
    check_storages(archive, folder, reader)
    tensors: dict[object, object] = {}
    for name, tensor in _Names(archive, folder).below(root, "", ()):
        tensors[name] = tensor
    if not tensors:
        raise InputError(
            "the TorchScript archive holds no parameters: a frozen module has them in its code",
            hint="Save the module before torch.jit.freeze, or its state_dict() with torch.save.",
        )
    file = FileBytes(handle)
    return SavedRecords(tensors, reader, file, storages_in(archive, folder, file))


class _Names:
    """The names of tensors below a module; each class's lists are looked up once."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self._archive = archive
        self._folder = folder
        self._visits_left = MOST_VISITS
        self._lists: dict[str, dict[str, tuple[frozenset[str], frozenset[str]]]] = {}

    def below(
        self, module: InstanceRecord, prefix: str, above: tuple[InstanceRecord, ...]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) as ``state_dict()`` orders them: parameters, buffers, then each module below."""
        if any(module is one for one in above) or len(above) > _DEEPEST:
            raise DamagedFileError(f"its modules contain themselves, or are nested more than {_DEEPEST} deep")
        self._visits_left -= 1
        if self._visits_left < 0:
            raise InputError(f"the archive uses its modules in more than {MOST_VISITS} places")
        if module.has_odd_state or module.state is None:
            raise InputError(
                f"a {quoted(module.kind.path)} keeps its state in a way of its own (quantized?)",
                needed="modules of parameters and buffers",
            )
        for group in self._lists_of(module.kind):
            for name, value in module.state.items():
                if name in group and isinstance(value, (TensorRecord, ParameterRecord)):
                    yield f"{prefix}{name}", value
        for name, value in module.state.items():
            if isinstance(value, InstanceRecord) and not value.has_odd_state:
                yield from self.below(value, f"{prefix}{name}.", (*above, module))

    def _lists_of(self, kind: GlobalName) -> tuple[frozenset[str], frozenset[str]]:
        if kind.module not in self._lists:
            self._lists[kind.module] = self._read(kind.module)
        lists = self._lists[kind.module].get(kind.name)
        if lists is None:
            raise DamagedFileError(f"the archive does not say what a {quoted(kind.path)} is")
        return lists

    def _read(self, module: str) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
        member = f"{self._folder}code/{module.replace('.', '/')}.py"
        if member not in self._archive:
            return {}
        try:
            text = self._archive.read(member, _MOST_CODE_BYTES).decode()
        except UnicodeDecodeError:
            raise DamagedFileError(f"member {quoted(member)} is not text") from None
        found = {}
        for name, lists in _CLASS.findall(text):
            names = {kind: frozenset(re.findall(r'"([^"]*)"', entries)) for kind, entries in _LIST.findall(lists)}
            found[name] = names.get("parameters", frozenset()), names.get("buffers", frozenset())
        return found
