"""Zip archives whose table of contents lies, and members whose bytes are not what was written."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from repconv_cli.checkpoint.archive import Archive
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError
from tests.checkpoint.hostile_files import checkpoint, pickled, zip_file


def test_a_flipped_bit_in_any_tensor_is_found(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    torch.save({"a": torch.full((64,), 1.5), "b": torch.full((64,), 2.5)}, tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    for value in (1.5, 2.5):
        place = whole.index(struct.pack("<f", value) * 64) + 77
        damaged = bytearray(whole)
        damaged[place] ^= 4
        (tmp_path / "w.pt").write_bytes(damaged)
        refused(tmp_path / "w.pt", DamagedFileError, "fails its checksum")


def test_a_flipped_bit_in_the_pickle_is_found(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    torch.save({"weight": torch.ones(4)}, tmp_path / "w.pt")
    damaged = bytearray((tmp_path / "w.pt").read_bytes())
    damaged[damaged.index(b"weight")] ^= 1
    (tmp_path / "w.pt").write_bytes(damaged)
    refused(tmp_path / "w.pt", DamagedFileError, "data.pkl fails its checksum")


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "a\\..\\up", "C:up"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, refused, name: str) -> None:  # type: ignore[no-untyped-def]
    path = zip_file(tmp_path / "w.pt", {"archive/data.pkl": pickled({}), name: b"x"})
    refused(path, UnsafeFileError, "unsafe name")


def test_a_name_used_twice_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = checkpoint(tmp_path / "w.pt", pickled({}))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data.pkl", b"another")
    refused(path, DamagedFileError, "two members called archive/data.pkl")


def test_two_checkpoints_in_one_archive_are_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = zip_file(tmp_path / "w.pt", {"a/data.pkl": pickled({}), "b/data.pkl": pickled({})})
    refused(path, DamagedFileError, "holds 2 checkpoints")


def edited_directory(path: Path, member: str, offset: int, value: bytes) -> Path:
    """Overwrite a field of a member's entry in the table of contents."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(member.encode()) - 46
    content[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(content)
    return path


def test_overlapping_members_are_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = checkpoint(tmp_path / "w.pt", pickled({}), {"0": b"1234"})
    grown = struct.pack("<2I", 300, 300)
    refused(edited_directory(path, "archive/data.pkl", 20, grown), DamagedFileError, "data.pkl overlaps")


def test_a_member_that_points_at_another_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = checkpoint(tmp_path / "w.pt", pickled({}), {"0": b"1234", "1": b"1234"})
    with zipfile.ZipFile(path) as archive:
        place = struct.pack("<I", archive.getinfo("archive/data/0").header_offset)
    refused(edited_directory(path, "archive/data/1", 42, place), DamagedFileError, "overlaps")


def test_a_size_beyond_the_stored_bytes_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = checkpoint(tmp_path / "w.pt", pickled({}), {"0": b"1234"})
    path = edited_directory(path, "archive/data/0", 24, struct.pack("<I", 1 << 30))
    refused(path, DamagedFileError, "claims 1073741824 bytes and holds 4")


def test_an_encrypted_member_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = edited_directory(checkpoint(tmp_path / "w.pt", pickled({})), "archive/data.pkl", 8, b"\x01\x00")
    refused(path, InputError, "encrypted")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    bomb = {"archive/data.pkl": pickled({}), "archive/data/0": bytes(64 << 20)}
    path = zip_file(tmp_path / "w.pt", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refused(path, UnsafeFileError, "compressed members claim")


def test_an_unusual_compression_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = zip_file(tmp_path / "w.pt", {"archive/data.pkl": pickled({})}, zipfile.ZIP_LZMA)
    refused(path, InputError, "compressed by method 14")


def test_big_endian_tensors_are_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    path = zip_file(tmp_path / "w.pt", {"a/data.pkl": pickled({}), "a/byteorder": b"big"})
    refused(path, InputError, "big-endian")


def test_a_member_is_read_only_to_its_limit(tmp_path: Path) -> None:
    archive = Archive(io.BytesIO(zip_file(tmp_path / "a.zip", {"a": b"12345"}).read_bytes()))
    assert archive.read("a", 5) == b"12345"
    with pytest.raises(InputError, match="has 5 bytes; needed: at most 4"):
        archive.read("a", 4)
    with pytest.raises(DamagedFileError, match="no member b"):
        archive.read("b", 4)
