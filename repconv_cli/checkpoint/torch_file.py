"""torch checkpoints, zip and legacy: the pickle is checked as records, then built from the bytes in the file.

torch's own loader takes no part. It accepts claims that the file does not hold, and checks no checksum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

from repconv_cli.checkpoint.admitted import ITEM_BYTES
from repconv_cli.checkpoint.archive import Archive
from repconv_cli.checkpoint.formats import LEGACY_MAGIC
from repconv_cli.checkpoint.pickles import MOST_PICKLE_BYTES, PickleReader
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.reading import fill_from
from repconv_cli.checkpoint.records import StorageRecord
from repconv_cli.checkpoint.states import check_states
from repconv_cli.errors import DamagedFileError, InputError

if TYPE_CHECKING:
    from repconv_cli.checkpoint.rebuild import FillStorage

_AGAIN = "Download or save it again."
_LEGACY_PROTOCOL = 1001


def read_zip(handle: BinaryIO, trusted: Sequence[str] = ()) -> object:
    """Return the object saved in a torch zip checkpoint: plain values, CPU tensors and modules.

    Raises:
        UnsafeFileError: the pickle asks for anything that is not admitted.
        DamagedFileError: a member is missing, has another size than the pickle claims, or fails its checksum.
        InputError: it holds tensors that cannot be fused (quantized, sparse, big-endian).
    """
    archive = Archive(handle)
    folder = _folder(archive)
    if f"{folder}byteorder" in archive and archive.read(f"{folder}byteorder", 16).strip() != b"little":
        raise InputError("its tensors are stored big-endian", hint="Save it again on a little-endian machine.")
    reader = PickleReader(trusted, _bytes_present(archive, handle))
    record = reader.read(_member(archive, f"{folder}data.pkl"))
    for storage in reader.constructors.storages.values():
        _check_storage(archive, folder, storage)

    def fill(storage: StorageRecord, target: memoryview) -> None:
        archive.read_into(f"{folder}data/{storage.key}", target)

    return _build(reader, record, fill, trusted)


def read_legacy(handle: BinaryIO, trusted: Sequence[str] = ()) -> object:
    """Return the object saved in a torch checkpoint of the layout before torch 1.6.

    Such a file is five pickles (magic, protocol, machine, object, storage keys) and then each storage:
    its element count as 8 bytes, and its elements.

    Raises:
        UnsafeFileError: a pickle asks for anything that is not admitted.
        DamagedFileError: the file ends early, or a storage has another size than the pickle claims.
        InputError: as :func:`read_zip`.
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

    def fill(storage: StorageRecord, target: memoryview) -> None:
        fill_from(handle, places[storage.key], target, f"storage {quoted(storage.key)}")

    return _build(reader, record, fill, trusted)


def _build(reader: PickleReader, record: object, fill: FillStorage, trusted: Sequence[str]) -> object:
    check_states(reader.instances)
    from repconv_cli.checkpoint.rebuild import Rebuilder

    return Rebuilder(fill, trusted).rebuild(record)


def _folder(archive: Archive) -> str:
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


def _check_storage(archive: Archive, folder: str, storage: StorageRecord) -> None:
    name = f"{folder}data/{storage.key}"
    if archive.size(name) != storage.nbytes:
        raise DamagedFileError(
            f"storage {quoted(storage.key)} claims {storage.nbytes} bytes and has {archive.size(name)}", hint=_AGAIN
        )


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
