"""The SHA-256 of a file, counted on a second core while the file is read and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20


class Digest:
    """The SHA-256 of an open file, begun at once; :meth:`hexdigest` waits for it. Leaves the file's position alone."""

    def __init__(self, handle: BinaryIO) -> None:
        self._descriptor = handle.fileno()
        self._is_wanted = True
        self._pool = ThreadPoolExecutor(1)
        self._future: Future[str] = self._pool.submit(self._count)

    def hexdigest(self) -> str:
        """Return the digest as hexadecimal digits."""
        return self._future.result()

    def __enter__(self) -> Digest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error nobody wants it, and the file is about to be closed.
        self._is_wanted = False
        self._pool.shutdown()

    def _count(self) -> str:
        digest, place = hashlib.sha256(), 0
        # Reading at a place moves nothing that the other thread relies on.
        while self._is_wanted and (chunk := os.pread(self._descriptor, _CHUNK_BYTES, place)):
            digest.update(chunk)
            place += len(chunk)
        return digest.hexdigest()


def digest_of_all(named: Iterable[tuple[str, str]]) -> str:
    """Return one digest for several files, from (name, digest) of each: that of what ``sha256sum`` prints for them.

    >>> digest_of_all([("b", "22"), ("a", "11")]) == digest_of_all([("a", "11"), ("b", "22")])
    True
    """
    lines = sorted((name, digest) for name, digest in named)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()
