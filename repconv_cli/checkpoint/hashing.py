"""The SHA-256 of a file, counted on a second core while the file is read and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from repconv_cli.checkpoint.formats import open_regular
from repconv_cli.errors import InputError

# While torch is imported, a thread waits for its turn some milliseconds after each.
_CHUNK_BYTES = 16 << 20


class Digest:
    """The SHA-256 of an open file, begun at once; :meth:`hexdigest` waits for it. Leaves the file's position alone."""

    def __init__(self, handle: BinaryIO) -> None:
        self._descriptor = handle.fileno()
        self._identity = _identity(handle)
        self._is_wanted = True
        self._pool = ThreadPoolExecutor(1)
        self._future: Future[str] = self._pool.submit(self._count)

    def is_of(self, handle: BinaryIO) -> bool:
        """Whether ``handle`` is of the same file, unchanged since this was begun, and this is not given up."""
        return self._is_wanted and _identity(handle) == self._identity

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
        # One for all: fresh memory for each chunk would have to be cleared first.
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, self._identity[2] + 1)))
        # Reading at a place moves nothing that the other thread relies on.
        while self._is_wanted and (count := os.preadv(self._descriptor, [buffer], place)):
            digest.update(buffer[:count])
            place += count
        return digest.hexdigest()


_ahead: ContextVar[Digest | None] = ContextVar("ahead", default=None)


@contextmanager
def digest_ahead(path: str | Path) -> Iterator[None]:
    """Count the SHA-256 of a file while something else is done first, such as an import, for :func:`digest_of`.

    Does nothing if there is no such file: whoever opens it says why.
    """
    try:
        handle = open_regular(Path(path))
    except InputError:
        yield
        return
    with handle, Digest(handle) as digest:
        token = _ahead.set(digest)
        try:
            yield
        finally:
            _ahead.reset(token)


def digest_of(handle: BinaryIO) -> Digest:
    """Return the digest of an open file: the one that :func:`digest_ahead` began, if the file is still the same."""
    ahead = _ahead.get()
    return ahead if ahead is not None and ahead.is_of(handle) else Digest(handle)


def _identity(handle: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(handle.fileno())
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def digest_of_all(named: Iterable[tuple[str, str]]) -> str:
    """Return one digest for several files, from (name, digest) of each: that of what ``sha256sum`` prints for them.

    >>> digest_of_all([("b", "22"), ("a", "11")]) == digest_of_all([("a", "11"), ("b", "22")])
    True
    """
    lines = sorted((name, digest) for name, digest in named)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()
