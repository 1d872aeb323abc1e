"""What one thread writes, another reads as soon as it is there, and never waits for what will not come."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from repconv_cli.checkpoint import Writing, write_safetensors
from repconv_cli.checkpoint.writing import AbandonedError
from repconv_cli.errors import OutputError

TENSORS = {"a": torch.randn(7, 3, 5), "b": torch.randn(20), "c": torch.tensor(3.0), "d": torch.randn(4, 2).half()}


def test_what_is_written_can_be_read_before_the_next_is_made(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("w+b") as handle, Writing() as written:

        def chunks() -> Iterator[bytes]:
            content = b""
            for piece in (b"one", b"two", b"three"):
                yield piece
                content += piece
                written.wait_for(len(content))
                assert path.read_bytes() == content

        written.write(handle, chunks())
        assert written.size == 11
        assert written.sha256() == hashlib.sha256(b"onetwothree").hexdigest()


def test_nobody_waits_for_what_will_not_be_written(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"one"
        raise ZeroDivisionError

    with (tmp_path / "file").open("w+b") as handle, ThreadPoolExecutor(4) as pool:
        with Writing() as written:
            there, more, whole = (pool.submit(written.wait_for, size) for size in (3, 4, 400))
            digest = pool.submit(written.sha256)
            with pytest.raises(ZeroDivisionError):
                written.write(handle, broken())
        assert there.result(10) is None
        for future in (more, whole, digest):
            with pytest.raises(AbandonedError):
                future.result(10)


def test_nobody_waits_for_more_than_the_whole_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as handle, Writing() as written, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(written.wait_for, 4)
        written.write(handle, iter([b"one"]))
        with pytest.raises(AbandonedError):
            waiting.result(10)


def test_an_error_of_the_disk_that_is_told_once_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repconv_cli.checkpoint.writing._PIECE_BYTES", 64)
    calls = []

    def fails_first(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails_first)
    with pytest.raises(OutputError, match=os.strerror(errno.EIO)):
        write_safetensors(tmp_path / "out", TENSORS, {}, force=False)
    assert os.listdir(tmp_path) == []
