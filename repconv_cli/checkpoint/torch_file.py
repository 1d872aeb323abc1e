"""torch checkpoints, zip and legacy: the pickle is checked as records, then built from the bytes in the file.

torch's own loader takes no part. It accepts claims that the file does not hold, and checks no checksum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from repconv_cli.checkpoint.admitted import ITEM_BYTES
from repconv_cli.checkpoint.archive import Archive
from repconv_cli.checkpoint.formats import LEGACY_MAGIC
from repconv_cli.checkpoint.pickles import MOST_PICKLE_BYTES, PickleReader
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.reading import FileBytes
from repconv_cli.checkpoint.records import InstanceRecord, StorageRecord
from repconv_cli.checkpoint.states import check_states, has_foreign_part, instances_in
from repconv_cli.checkpoint.wrappers import Unwrapped, unwrap
from repconv_cli.errors import DamagedFileError, InputError

if TYPE_CHECKING:
    import torch

    from repconv_cli.checkpoint.rebuild import ReadStorage

Storages = Callable[[], AbstractContextManager["ReadStorage"]]
"""Gives what reads storages. Their bytes are not to be used before its block is left: until then they are checked."""

_CHECKED_AT_ONCE = 2
_AGAIN = "Download or save it again."
_LEGACY_PROTOCOL = 1001


@dataclass(frozen=True)
class SavedRecords:
    """What a checkpoint's pickle says, as records, and where the bytes of its storages come from."""

    record: object
    reader: PickleReader
    file: FileBytes
    storages: Storages

    def unwrapped(self, state_key: str | None = None) -> Unwrapped:
        """Return the module or the weights in it, checked to be made of admitted parts alone.

        Raises:
            UnsafeFileError: what is to be used asks for anything that is not admitted.
            InputError: there are no weights, or no entry ``state_key``.
        """
        try:
            inside = unwrap(self.record, state_key)
        except InputError as error:
            if not (state_key is not None and error.found.startswith("there is no entry")):
                self.reader.refuse_foreign()
            raise
        if isinstance(inside.content, InstanceRecord):
            parts = instances_in(inside.content)
            if any(has_foreign_part(part) for part in parts):
                self.reader.refuse_foreign()
            check_states(parts)
        return inside


def open_zip(handle: BinaryIO, trusted: Sequence[str] = ()) -> SavedRecords:
    """Return the records of a torch zip checkpoint.

    Raises:
        UnsafeFileError: the pickle names something that would act on the machine.
        DamagedFileError: a member is missing, has another size than the pickle claims, or fails its checksum.
        InputError: it holds tensors that cannot be fused (quantized, sparse, big-endian).
    """
    archive = Archive(handle)
    folder = record_folder(archive)
    if f"{folder}byteorder" in archive and archive.read(f"{folder}byteorder", 16).strip() != b"little":
        raise InputError("its tensors are stored big-endian", hint="Save it again on a little-endian machine.")
    reader = PickleReader(trusted, _bytes_present(archive, handle))
    record = reader.read(_member(archive, f"{folder}data.pkl"))
    check_storages(archive, folder, reader)
    file = FileBytes(handle)
    return SavedRecords(record, reader, file, storages_in(archive, folder, file))


def open_legacy(handle: BinaryIO, trusted: Sequence[str] = ()) -> SavedRecords:
    """Return the records of a torch checkpoint of the layout before torch 1.6.

    Such a file is five pickles (magic, protocol, machine, object, storage keys) and then each storage:
    its element count as 8 bytes, and its elements.

    Raises:
        UnsafeFileError: a pickle names something that would act on the machine.
        DamagedFileError: the file ends early, or a storage has another size than the pickle claims.
        InputError: as :func:`open_zip`.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    reader = PickleReader(trusted, size)
    magic, protocol = reader.read(handle), reader.read(handle)
    if magic != LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise InputError("a legacy checkpoint of an unknown version", hint="Save it again with a current torch.")
    machine = reader.read(handle)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise InputError("its tensors are not stored little-endian", hint="Save it again with a current torch.")
    record = reader.read(handle)
    places = _legacy_places(handle, size, reader.read(handle), reader.constructors.storages)
    file = FileBytes(handle)

    def read(storage: StorageRecord) -> torch.Tensor:
        return file.take(places[storage.key], storage.nbytes, f"storage {quoted(storage.key)}")

    return SavedRecords(record, reader, file, lambda: nullcontext(read))


def record_folder(archive: Archive) -> str:
    """Return the folder inside the archive that its one ``data.pkl`` lies in, with a slash, or nothing.

    Raises:
        DamagedFileError: there is none, or several.
    """
    folders = [name[: -len("data.pkl")] for name in archive.names() if name.split("/")[-1] == "data.pkl"]
    folders = [folder for folder in folders if folder.count("/") == 1 or not folder]
    if len(folders) != 1:
        raise DamagedFileError(f"the archive holds {len(folders)} checkpoints", needed="one data.pkl", hint=_AGAIN)
    return folders[0]


def _member(archive: Archive, name: str) -> BinaryIO:
    return BytesIO(archive.read(name, MOST_PICKLE_BYTES))


def _bytes_present(archive: Archive, handle: BinaryIO) -> int:
    # Of compressed members the archive has bounded the sum already.
    return max(handle.seek(0, os.SEEK_END), sum(archive.size(name) for name in archive.names()))


def storages_in(archive: Archive, folder: str, file: FileBytes) -> Storages:
    """Return what reads the storages of the checkpoint in ``folder`` of ``archive``, their checksums checked."""

    @contextmanager
    def storages() -> Iterator[ReadStorage]:
        import torch

        pool = ThreadPoolExecutor(_CHECKED_AT_ONCE)
        checks: list[Future[None]] = []

        def read(storage: StorageRecord) -> torch.Tensor:
            name = f"{folder}data/{storage.key}"
            if file.is_mapped and (place := archive.place(name)) is not None:
                checks.append(pool.submit(archive.check, name))
                return file.take(place, storage.nbytes, f"member {quoted(name)}")
            raw = torch.empty(storage.nbytes, dtype=torch.uint8)
            if storage.nbytes:
                archive.read_into(name, raw.numpy().data)
            return raw

        try:
            yield read
            for check in checks:
                check.result()
        finally:
            pool.shutdown(cancel_futures=True)

    return storages


def check_storages(archive: Archive, folder: str, reader: PickleReader) -> None:
    """Check that every storage that was referred to is there, in its claimed size.

    Raises:
        DamagedFileError: one is not.
    """
    for storage in reader.constructors.storages.values():
        held = archive.size(f"{folder}data/{storage.key}")
        if held != storage.nbytes:
            found = f"storage {quoted(storage.key)} claims {storage.nbytes} bytes and has {held}"
            raise DamagedFileError(found, hint=_AGAIN)


def _legacy_places(handle: BinaryIO, size: int, keys: object, storages: dict[str, StorageRecord]) -> dict[str, int]:
    """Return where each storage's elements start; every storage in use must be there, with its claimed size."""
    if not isinstance(keys, list) or len(keys) != len(set(map(str, keys))):
        raise DamagedFileError("its list of storages is not one", hint=_AGAIN)
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise DamagedFileError(f"it holds a storage {quoted(key)} that nothing uses", hint=_AGAIN)
        header = handle.read(8)
        start = handle.tell()
        count = storage.nbytes // ITEM_BYTES[storage.dtype]
        if len(header) < 8 or start + storage.nbytes > size:
            raise DamagedFileError(f"storage {quoted(key)} ends at byte {size}, cut short", hint=_AGAIN)
        if int.from_bytes(header, "little") != count:
            raise DamagedFileError(f"storage {quoted(key)} has another size than its {count} elements", hint=_AGAIN)
        places[key] = start
        handle.seek(start + storage.nbytes)
    missing = storages.keys() - places.keys()
    if missing:
        raise DamagedFileError(f"the elements of {len(missing)} storages are missing", hint=_AGAIN)
    return places
