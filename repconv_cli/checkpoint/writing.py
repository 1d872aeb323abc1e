"""A file that is hashed and read back while it is written."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from types import TracebackType
from typing import BinaryIO

_PIECE_BYTES = 32 << 20


class AbandonedError(Exception):
    """What a thread waits for will never be written."""


class Writing:
    """What one thread writes to a file, for another one that reads it back.

    ``size`` is how much of it can be read, and ``sha256`` the digest of all of it. When the block that it is the
    context of is left, nobody waits for more.
    """

    def __init__(self) -> None:
        self.size = 0
        self._changed = Condition()
        self._digest: str | None = None
        self._is_over = False

    def __enter__(self) -> Writing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def wait_for(self, size: int) -> None:
        """Return when the first ``size`` bytes can be read.

        Raises:
            AbandonedError: writing ended before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ended() or self.size >= size)
            if self.size < size:
                raise AbandonedError

    def sha256(self) -> str:
        """Return the digest of the whole file, once it is there.

        Raises:
            AbandonedError: it will never be.
        """
        with self._changed:
            self._changed.wait_for(self._is_ended)
            if self._digest is None:
                raise AbandonedError
            return self._digest

    def _is_ended(self) -> bool:
        return self._is_over or self._digest is not None

    def write(
        self, handle: BinaryIO, chunks: Iterator[bytes | memoryview], release: Callable[[], None] | None = None
    ) -> None:
        """Write ``chunks`` to ``handle``, each one hashed and written while the next is made, and flush it.

        ``release`` is called now and then, when some were written.
        """
        digest, fresh = hashlib.sha256(), 0

        def write(piece: bytes | memoryview) -> None:
            handle.write(piece)
            handle.flush()
            with self._changed:
                self.size += len(piece)
                self._changed.notify_all()

        # One thread each, so that the pieces stay in order.
        with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as flushing:
            under_way: deque[Future[object]] = deque()
            flushed: deque[Future[object]] = deque()
            for chunk in chunks:
                # Nothing but the writing holds a chunk while the next one is made; two would be one too many.
                _await(under_way)
                for start in range(0, len(chunk), _PIECE_BYTES):
                    piece = chunk[start : start + _PIECE_BYTES]
                    # Of a chunk that is mapped no more than this one piece and the one before is in memory.
                    _await(under_way, leave=2)
                    under_way += [hashing.submit(digest.update, piece), writing.submit(write, piece)]
                    fresh += len(piece)
                    del piece
                    if fresh < _PIECE_BYTES:
                        continue
                    fresh = 0
                    if release is not None:
                        release()
                    if not flushed or flushed[-1].done():
                        # What the disk has by now is not waited for at the end. It tells each error once.
                        _await(flushed)
                        flushed.append(flushing.submit(os.fsync, handle.fileno()))
                del chunk
            _await(under_way)
            _await(flushed)
        if release is not None:
            # What the file was made of need not lie beside what is read back.
            release()
        with self._changed:
            self._digest = digest.hexdigest()
            self._changed.notify_all()


def _await(under_way: deque[Future[object]], leave: int = 0) -> None:
    while len(under_way) > leave:
        under_way.popleft().result()
