"""The output file: complete under its final name, or not there at all."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.writing import Writing
from repconv_cli.errors import EXIT_TERMINATED, OutputError, RepconvError
from repconv_cli.quantities import age_of, size_of

if TYPE_CHECKING:
    import torch

_LONGEST_NAME_BYTES = 200


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written and read back.

    Attributes:
        path: where the bytes are; the target, if the output was a symbolic link.
        sha256: of the whole file, as hexadecimal digits.
        size_bytes: of the whole file.
        mode: its permissions, such as ``0o644``.
    """

    path: Path
    sha256: str
    size_bytes: int
    mode: int


def check_output(path: str | Path, *, force: bool, source: str | Path | None = None) -> Path:
    """Return where an output of this name is written: ``path``, or what it links to.

    Call it before long work starts; :func:`write_safetensors` calls it again.

    Raises:
        OutputError: it exists and ``force`` is not given, is the input (by any name), is a folder or a special
            file, or its folder does not exist or cannot be written.
    """
    named = Path(path)
    shown = quoted(named, limit=200)
    try:
        target = Path(os.path.realpath(named))
        folder = os.stat(target.parent)
        existing = _status(target)
        if source is not None and existing is not None and _is_file(source, existing):
            raise OutputError("the output is the input", where=shown, hint="Choose another name.")
    except FileNotFoundError:
        raise OutputError(f"there is no folder {quoted(target.parent)}", where=shown, hint="Make it first.") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"it cannot be written ({_reason(error)})", where=shown) from None
    if not stat.S_ISDIR(folder.st_mode):
        raise OutputError(f"{quoted(target.parent)} is not a folder", where=shown)
    if existing is not None:
        _check_existing(existing, force, shown)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {quoted(target.parent)} cannot be written", where=shown)
    return target


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    force: bool,
    source: str | Path | None = None,
    dry_run: bool = False,
    make: Callable[[str], torch.Tensor] | None = None,
    release: Callable[[], None] | None = None,
) -> WrittenFile:
    """Return the file that now holds ``tensors`` and ``metadata``, after reading it back bit for bit.

    Tensors are written one by one. With ``make``, ``tensors`` tell only their shapes and types, and each is made when
    its turn comes; whatever ``make`` raises ends it. ``release`` is called now and then, and may let go of the memory
    of what was read. The same arguments give the same bytes. With ``dry_run`` everything is done but the last rename.
    On any exception, and on SIGTERM, nothing new exists under ``path``, what stood there before still does, and the
    temporary file is gone. After SIGKILL the temporary file may be left.

    Raises:
        OutputError: as :func:`check_output`; or a tensor cannot be stored; or the disk refuses; or what was read
            back differs from what was written.
    """
    from repconv_cli.checkpoint import safetensors_bytes

    return write_chunks(
        path,
        safetensors_bytes.chunks(tensors, metadata, make),
        lambda path, written: safetensors_bytes.require_same(path, written, tensors, metadata),
        force=force,
        source=source,
        dry_run=dry_run,
        release=release,
        size=lambda: safetensors_bytes.size_of(tensors, metadata, is_made=make is not None),
    )


def write_chunks(
    path: str | Path,
    chunks: Iterator[bytes | memoryview],
    check: Callable[[Path, Writing], object],
    *,
    force: bool,
    source: str | Path | None = None,
    dry_run: bool = False,
    release: Callable[[], None] | None = None,
    size: Callable[[], int] | None = None,
) -> WrittenFile:
    """Return the file that now holds ``chunks``, after ``check`` has read back what is to be renamed.

    ``check`` runs in a thread of its own, from the start: it is given the file, as long as ``size`` gives where that is
    known before, and what tells how much of it is written. It waits for what it reads.

    Complete or not there, as :func:`write_safetensors` says. Whatever ``check`` raises ends it.
    """
    target = check_output(path, force=force, source=source)
    shown = quoted(path, limit=200)
    try:
        with _sigterm_raises(), _temporary_beside(target) as (temporary, handle):
            if size is not None:
                os.ftruncate(handle.fileno(), size())
            # Whatever ends the writing, the one that reads is told of it before it is waited for.
            with ThreadPoolExecutor(1) as pool, Writing() as written:
                checked = pool.submit(check, temporary, written)
                written.write(handle, chunks, release)
                # The disk takes its time, in which the rest is read back.
                os.fsync(handle.fileno())
                checked.result()
            mode = stat.S_IMODE(os.fstat(handle.fileno()).st_mode)
            if not dry_run:
                # The name may have been taken while the tensors were written.
                check_output(path, force=force, source=source)
                os.replace(temporary, target)
                _flush_folder(target.parent)
    except OSError as error:
        raise OutputError(f"it cannot be written ({_reason(error)})", where=shown) from None
    except RepconvError as error:
        raise error.at(shown) from None
    return WrittenFile(target, written.sha256(), written.size, mode)


def _status(path: Path) -> os.stat_result | None:
    # Unlike ``os.path.lexists``, this does not take a name that is too long for one that is free.
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def write_text(path: str | Path, text: str, *, force: bool, source: str | Path | None = None) -> None:
    """Write ``text`` as UTF-8 so that it is whole under ``path``, or not there: as :func:`write_safetensors` does.

    Raises:
        OutputError: as :func:`check_output`, or the disk refuses.
    """
    content = text.encode("utf-8", errors="replace")
    write_chunks(path, iter([content]), lambda path, written: None, force=force, source=source)


def _is_file(path: str | Path, status: os.stat_result) -> bool:
    # The same file under another name: a link, or another way to write the path.
    try:
        named = os.stat(path)
        if stat.S_ISDIR(named.st_mode):
            # Which of its files are read is not known here: none of them may be the output.
            with os.scandir(path) as entries:
                return any(entry.inode() == status.st_ino and _is_file(entry.path, status) for entry in entries)
        return os.path.samestat(named, status)
    except FileNotFoundError:
        return False


def _check_existing(existing: os.stat_result, force: bool, shown: str) -> None:
    mode = existing.st_mode
    if stat.S_ISDIR(mode):
        raise OutputError("it is a folder", where=shown, hint="Give the name of a file in it.")
    if not stat.S_ISREG(mode):
        raise OutputError("it is a pipe, socket or device", where=shown, needed="an ordinary file")
    if not force:
        told = f"{size_of(existing.st_size)}, {age_of(time.time() - existing.st_mtime)}"
        raise OutputError(
            f"it exists already ({told}); nothing was written", where=shown, hint="--force overwrites it."
        )


@contextmanager
def _temporary_beside(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Give a new file in the folder of ``target``, with the permissions it shall have; it is gone on leaving.

    The kernel applies the umask when the file is made, so that it need not be asked for (which would change it).
    """
    stem = os.fsdecode(os.fsencode(target.name)[:_LONGEST_NAME_BYTES])
    temporary = target.parent / f".{stem}.{secrets.token_hex(8)}.part"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as handle:
            with suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
            yield temporary, handle
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _flush_folder(folder: Path) -> None:
    # Without this, a power cut can undo the rename. Some file systems cannot flush a folder.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into ``SystemExit(EXIT_TERMINATED)`` while writing, unless the program handles it itself."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(_: int, __: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "the name is not valid"
