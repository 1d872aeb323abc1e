"""The digest of a file that is counted ahead is the digest of what is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from repconv_cli.checkpoint.hashing import digest_ahead, digest_of

CONTENT = os.urandom(1000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 20])
def test_the_digest_is_that_of_the_bytes(path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("repconv_cli.checkpoint.hashing._CHUNK_BYTES", chunk)
    with path.open("rb") as handle, digest_of(handle) as digest:
        assert digest.hexdigest() == hashlib.sha256(CONTENT).hexdigest()
        assert handle.tell() == 0


def test_a_digest_that_was_begun_is_gone_on_with(path: Path) -> None:
    with digest_ahead(path), path.open("rb") as handle, path.open("rb") as again:
        first = digest_of(handle)
        assert digest_of(again) is first
        assert first.hexdigest() == hashlib.sha256(CONTENT).hexdigest()
    with path.open("rb") as handle, digest_of(handle) as later:
        assert later is not first


def test_a_digest_that_was_given_up_is_not_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repconv_cli.checkpoint.hashing._CHUNK_BYTES", 1)
    with digest_ahead(path), path.open("rb") as handle:
        with pytest.raises(ZeroDivisionError), digest_of(handle):
            raise ZeroDivisionError
        with digest_of(handle) as digest:
            assert digest.hexdigest() == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_that_changed_is_counted_anew(path: Path, is_replaced: bool) -> None:
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with digest_ahead(path):
        if is_replaced:
            path.with_name("other").write_bytes(changed)
            os.replace(path.with_name("other"), path)
        else:
            path.write_bytes(changed)
            status = path.stat()
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with path.open("rb") as handle, digest_of(handle) as digest:
            assert digest.hexdigest() == hashlib.sha256(changed).hexdigest()


def test_another_file_has_its_own(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"other")
    with digest_ahead(path), other.open("rb") as handle, digest_of(handle) as digest:
        assert digest.hexdigest() == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("name", ["nothing", ".", "file/inside", "pipe"])
def test_what_is_no_file_is_left_to_whoever_reads_it(path: Path, name: str) -> None:
    os.mkfifo(path.with_name("pipe"))
    with digest_ahead(path.parent / name), path.open("rb") as handle, digest_of(handle) as digest:
        assert digest.hexdigest() == hashlib.sha256(CONTENT).hexdigest()
