"""Zip archives that lie: about names, sizes, places, checksums, and about which table of contents counts."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoint.hostile_files import checkpoint, pickled, zip_file
from tests.hostile.case import Case, make_net

_EMPTY = {"archive/data.pkl": pickled({}), "archive/version": b"3\n"}
_FLAGS, _METHOD, _CRC, _PACKED, _SIZE, _EXTRA, _PLACE = 8, 10, 16, 20, 24, 30, 42
"""Where fields lie in a member's entry in the table of contents."""


def saved() -> bytearray:
    """Return the net as torch saves it."""
    buffer = io.BytesIO()
    torch.save(make_net(), buffer)
    return bytearray(buffer.getvalue())


def _changed(change: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[Path], object]:
    """Return a writer of the saved net with its bytes changed."""

    def write(path: Path) -> None:
        content = saved()
        changed = change(content)
        path.write_bytes(content if changed is None else changed)

    return write


def _entry(content: bytearray, member: bytes) -> int:
    """Return where the member's entry in the table of contents starts."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(member))


def _field(member: bytes, offset: int, value: bytes) -> Callable[[Path], object]:
    def change(content: bytearray) -> None:
        start = _entry(content, member) + offset
        content[start : start + len(value)] = value

    return _changed(change)


def _local(member: bytes, offset: int, value: bytes) -> Callable[[Path], object]:
    def change(content: bytearray) -> None:
        start = content.rindex(b"PK\x03\x04", 0, content.index(member)) + offset
        content[start : start + len(value)] = value

    return _changed(change)


def _twice(path: Path) -> None:
    torch.save(make_net(), path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], pickled({}))


def _two_archives(path: Path) -> None:
    first = io.BytesIO()
    torch.save({"0.weight": torch.zeros(1)}, first)
    path.write_bytes(first.getvalue() + bytes(saved()))


def _named(name: str) -> Callable[[Path], object]:
    return lambda path: zip_file(path, {**_EMPTY, name: b"x"})


def _nul_in_name(path: Path) -> None:
    zip_file(path, {**_EMPTY, "archive/data/0xyz": b"1234"})
    path.write_bytes(path.read_bytes().replace(b"archive/data/0xyz", b"archive/data/0\0yz"))


def _renamed(content: bytearray) -> None:
    # The table of contents and the member's own header disagree about the name.
    content[content.index(b"/data/0") + 6] = ord("z")


def _comment(content: bytearray) -> bytes:
    end = content.rindex(b"PK\x05\x06")
    fake = bytes(content[end:])
    content[end + 20 : end + 22] = struct.pack("<H", len(fake))
    return bytes(content) + fake


def _compressed(method: int) -> Callable[[Path], object]:
    return lambda path: zip_file(path, _EMPTY, method)


_DAMAGED = (
    "cut short or damaged|the file is damaged|overlaps what follows|no header where|starts outside|claims .* and holds|"
    "unsafe name|no member"
)
TABLE = [
    ("member twice", _twice, "holds two members called"),
    ("prepended shell script", _changed(lambda c: b"#!/bin/sh\nrm -rf x\n" + bytes(c)), "format is not known"),
    ("prepended zeros", _changed(lambda c: bytes(4096) + bytes(c)), "format is not known"),
    ("prepended zip signature", _changed(lambda c: b"PK\x03\x04" + bytes(60) + bytes(c)), None),
    ("appended bytes", _changed(lambda c: bytes(c) + bytes(30_000)), None),
    ("appended much", _changed(lambda c: bytes(c) + bytes(100_000)), _DAMAGED),
    ("archive after another", _two_archives, None),
    ("two ends", _changed(_comment), f"{_DAMAGED}|None"),
    ("wrong checksum", _field(b"/data/0", _CRC, b"\0\0\0\0"), "fails its checksum"),
    ("wrong checksum of the pickle", _field(b"/data.pkl", _CRC, b"\0\0\0\0"), "fails its checksum"),
    ("size of a member", _field(b"/data/0", _SIZE, struct.pack("<I", 1 << 31)), _DAMAGED),
    ("both sizes of a member", _field(b"/data/0", _PACKED, struct.pack("<2I", 1 << 31, 1 << 31)), _DAMAGED),
    ("place of a member", _field(b"/data/0", _PLACE, struct.pack("<I", 1 << 30)), _DAMAGED),
    ("place of the pickle", _field(b"/data.pkl", _PLACE, struct.pack("<I", 64)), _DAMAGED),
    ("extra field longer than the file", _field(b"/data/0", _EXTRA, b"\xff\xff"), _DAMAGED),
    ("encrypted flag", _field(b"/data.pkl", _FLAGS, b"\x01\x00"), "encrypted"),
    ("encrypted flag in the member alone", _local(b"/data.pkl", 6, b"\x01"), None),
    ("patched data flag", _field(b"/data.pkl", _FLAGS, b"\x20\x00"), _DAMAGED),
    ("strongly encrypted flag", _field(b"/data.pkl", _FLAGS, b"\x40\x00"), _DAMAGED),
    ("name in the member alone", _changed(_renamed), _DAMAGED),
    ("signature of a member", _local(b"/data.pkl", 0, b"XXXX"), f"{_DAMAGED}|format is not known"),
    ("name length of a member", _local(b"/data/0", 26, b"\xff\xff"), _DAMAGED),
    ("absolute name", _named("/etc/passwd"), "unsafe name"),
    ("name that leaves", _named("../../up"), "unsafe name"),
    ("name inside that leaves", _named("archive/data/../../../up"), "unsafe name"),
    ("Windows name", _named("C:\\up"), "unsafe name"),
    ("name with a NUL", _nul_in_name, "unsafe name"),
    ("name with an escape", _named("archive/\x1b]0;title\x07"), "no weights"),
    ("name of 60,000 characters", _named("archive/" + "n" * 60_000), "no weights"),
    ("bzip2", _compressed(zipfile.ZIP_BZIP2), "compressed by method 12"),
    ("lzma", _compressed(zipfile.ZIP_LZMA), "compressed by method 14"),
    ("unknown compression", _field(b"/data.pkl", _METHOD, b"\x63\x00"), "compressed by method 99"),
    ("another disk", _changed(lambda c: c.__setitem__(slice(-18, -14), b"\x01\x00\x01\x00")), None),
    ("empty archive", lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "format is not known|no model"),
    ("two checkpoints", lambda path: zip_file(path, {"a/data.pkl": b".", "b/data.pkl": b"."}), "holds 2 checkpoints"),
    ("no pickle", lambda path: zip_file(path, {"archive/version": b"3"}), "no model"),
    ("folder as the pickle", lambda path: zip_file(path, {"archive/data.pkl/": b""}), "no model|fails"),
    ("big-endian", lambda path: zip_file(path, {**_EMPTY, "archive/byteorder": b"big"}), "big-endian"),
    ("byte order of a megabyte",
     lambda path: zip_file(path, {**_EMPTY, "archive/byteorder": bytes(1 << 20)}), "at most 16"),
]  # fmt: skip


def _cut(share: float) -> Callable[[Path], object]:
    return _changed(lambda content: content[: int(len(content) * share)])


def _flipped(seed: int) -> Callable[[Path], object]:
    """Return a writer of the weights with one bit of a tensor or of the pickle flipped."""

    def change(content: bytearray) -> None:
        start = content.index(b"/data.pkl" if seed % 2 else b"/data/0") + 100
        content[start + seed * 7] ^= 1 << seed % 8

    return _changed(change)


def _legacy_cut(end: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        torch.save(make_net(), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:end])

    return write


_NOT_WHOLE = "cut short|damaged|not known|is empty|bare pickle|not well-formed|at most the file's"
DAMAGE = [
    *((f"cut to {share}", _cut(share), _NOT_WHOLE) for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999)),
    *((f"legacy cut at {end}", _legacy_cut(end), _NOT_WHOLE) for end in (1, 40, 200, 2000, -1)),
    *((f"flipped bit {seed}", _flipped(seed), "fails its checksum") for seed in range(4)),
]

CASES = (
    *(Case(f"zip: {name}", write, reason) for name, write, reason in (*TABLE, *DAMAGE)),
    Case("zip: weights alone", lambda path: checkpoint(path, pickled({})), "holds no weights"),
)
