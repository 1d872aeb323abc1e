"""A zip archive whose table of contents has been checked before any member is read."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError

MOST_MEMBERS = 200_000
"""Members in one archive; a checkpoint has one for each tensor storage."""

_CHUNK_BYTES = 1 << 20
_CHECKED_BYTES = 4 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1
_AGAIN = "Download or save it again."


class Archive:
    """The members of one zip file, by name, each read only to its claimed size and against its checksum.

    torch stores its members uncompressed. Deflated ones (a checkpoint zipped again by hand) are read as long as
    they do not claim far more than the file itself holds.
    """

    def __init__(self, handle: BinaryIO) -> None:
        self._size = handle.seek(0, os.SEEK_END)
        self._handle = handle
        handle.seek(0)
        with _zip_errors():
            self._zip = zipfile.ZipFile(handle)
        self._members = self._checked(self._zip.infolist())
        self._places = self._checked_places()

    def names(self) -> list[str]:
        """Return every member's name, in the order of the table of contents."""
        return list(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Return the bytes that member ``name`` holds once read.

        Raises:
            DamagedFileError: there is no such member.
        """
        if name not in self._members:
            raise DamagedFileError(f"the archive has no member {quoted(name)}", hint=_AGAIN)
        return self._members[name].file_size

    def read(self, name: str, most: int) -> bytes:
        """Return a whole member of at most ``most`` bytes, its checksum checked.

        Raises:
            InputError: it is larger than ``most``.
            DamagedFileError: it is missing, cut short, or its checksum does not match.
        """
        size = self.size(name)
        if size > most:
            raise InputError(f"member {quoted(name)} has {size} bytes", needed=f"at most {most}")
        content = bytearray(size)
        self.read_into(name, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, target: memoryview) -> None:
        """Fill ``target``, which is exactly as long as member ``name``, and check the member's checksum.

        Raises:
            DamagedFileError: the member is missing, has another size, is cut short, or fails its checksum.
        """
        size = self.size(name)
        if size != len(target):
            raise DamagedFileError(f"member {quoted(name)} has {size} bytes", needed=f"{len(target)} bytes")
        filled = 0
        with _zip_errors(name), self._zip.open(self._members[name]) as member:
            while chunk := member.read(_CHUNK_BYTES):
                target[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        if filled != size:
            raise DamagedFileError(f"member {quoted(name)} ends after {filled} of {size} bytes", hint=_AGAIN)

    def place(self, name: str) -> int | None:
        """Return where in the file the bytes of member ``name`` begin, for :meth:`check`; None if it is compressed.

        Raises:
            DamagedFileError: there is no such member.
        """
        self.size(name)
        is_stored = self._members[name].compress_type == zipfile.ZIP_STORED
        return self._places[name] if is_stored else None

    def check(self, name: str) -> None:
        """Check the checksum of a member that is not compressed. Several threads may do so at a time, in a real file.

        Raises:
            DamagedFileError: it fails its checksum, or is cut short.
        """
        info, place, found = self._members[name], self._places[name], 0
        left = info.file_size
        buffer = memoryview(bytearray(min(_CHECKED_BYTES, left)))
        with _zip_errors(name):
            while left:
                # Reading at a place moves nothing that another thread relies on.
                count = os.preadv(self._handle.fileno(), [buffer[:left]], place)
                if not count:
                    raise EOFError
                found = zlib.crc32(buffer[:count], found)
                place, left = place + count, left - count
            if found != info.CRC:
                raise zipfile.BadZipFile

    def _checked(self, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        if len(infos) > MOST_MEMBERS:
            raise InputError(f"the archive has {len(infos)} members", needed=f"at most {MOST_MEMBERS}")
        members: dict[str, zipfile.ZipInfo] = {}
        inflated = 0
        for info in infos:
            _check_name(info)
            if info.filename in members:
                raise DamagedFileError(f"the archive holds two members called {quoted(info.filename)}")
            if info.flag_bits & _ENCRYPTED:
                raise InputError("the archive is encrypted", hint="Unpack it with its password first.")
            inflated += self._inflated_size(info)
            members[info.filename] = info
        allowed = (1 << 20) + 8 * self._size
        if inflated > allowed:
            raise UnsafeFileError(
                f"compressed members claim {inflated} bytes in a file of {self._size}", needed=f"at most {allowed}"
            )
        return members

    def _inflated_size(self, info: zipfile.ZipInfo) -> int:
        name = quoted(info.filename)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            return info.file_size
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"member {name} is compressed by method {info.compress_type}", needed="stored or deflated")
        if info.file_size != info.compress_size:
            raise DamagedFileError(f"member {name} claims {info.file_size} bytes and holds {info.compress_size}")
        return 0

    def _checked_places(self) -> dict[str, int]:
        """Return where each member begins: between its own header and the next, so no byte is used for two of them."""
        places: dict[str, int] = {}
        in_order = sorted(self._members.values(), key=lambda info: info.header_offset)
        limits = [info.header_offset for info in in_order[1:]] + [self._zip.start_dir]
        for info, limit in zip(in_order, limits, strict=False):
            name = quoted(info.filename)
            if not 0 <= info.header_offset <= self._size - _LOCAL_HEADER.size:
                raise DamagedFileError(f"member {name} starts outside of the file", hint=_AGAIN)
            self._handle.seek(info.header_offset)
            header = _LOCAL_HEADER.unpack(self._handle.read(_LOCAL_HEADER.size))
            if header[0] != b"PK\x03\x04":
                raise DamagedFileError(f"member {name} has no header where the table of contents puts it", hint=_AGAIN)
            places[info.filename] = info.header_offset + _LOCAL_HEADER.size + int(header[-2]) + int(header[-1])
            end = places[info.filename] + info.compress_size
            if end > limit:
                raise DamagedFileError(f"member {name} overlaps what follows it, by {end - limit} bytes", hint=_AGAIN)
        return places


def _check_name(info: zipfile.ZipInfo) -> None:
    name = info.filename
    parts = name.split("/")
    # zipfile cuts a name at its first NUL, so that the name used would not be the name stored.
    if info.orig_filename != name or name.startswith("/") or "\\" in name or ".." in parts or ":" in parts[0][1:2]:
        raise UnsafeFileError(f"the archive holds a member with an unsafe name: {quoted(info.orig_filename)}")


@contextmanager
def _zip_errors(name: str | None = None) -> Iterator[None]:
    """Everything that a broken archive makes ``zipfile`` raise, as one sentence."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, OverflowError):
        if name is None:
            found = "the zip archive has no readable table of contents: the file is cut short or damaged"
        else:
            found = f"member {quoted(name)} fails its checksum or is cut short: the file is damaged"
        raise DamagedFileError(found, hint=_AGAIN) from None
