"""What a file is, told from its first bytes and its table of contents, never from its extension."""

from __future__ import annotations

import difflib
import os
import stat
import zipfile
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError


class FileFormat(Enum):
    """A kind of file that can be read here."""

    TORCH_ZIP = "torch checkpoint"
    TORCH_LEGACY = "torch checkpoint (before torch 1.6)"
    TORCHSCRIPT = "TorchScript archive"
    EXPORTED = "torch.export program"
    SAFETENSORS = "safetensors"
    INDEX = "an index of shards"


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The integer that opens a torch checkpoint of the older, non-zip layout."""

_READABLE = "a torch checkpoint, a .pt2 program or a .safetensors file"
_HEAD_BYTES = 512
_MOST_INDEX_BYTES = 16 << 20

# (bytes at the very start, what that file is, what to do about it)
_FOREIGN_HEADS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file itself", "Run `git lfs pull` to fetch the file."),
    (b"\x1f\x8b", "gzip-compressed data", "Unpack it first (`gunzip` or `tar xzf`)."),
    (b"BZh", "bzip2-compressed data", "Unpack it first."),
    (b"\xfd7zXZ\x00", "xz-compressed data", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data", "Unpack it first."),
    (b"GGUF", "a GGUF model", f"Give {_READABLE} of the model."),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)", f"Give {_READABLE} of the model."),
    (b"\x93NUMPY", "a numpy array", f"Give {_READABLE}."),
    (b"\x7fELF", "a compiled library", f"Give {_READABLE}."),
)
_ONNX_HINT = "Give the torch checkpoint that it was exported from."


def open_regular(path: Path) -> BinaryIO:
    """Return ``path`` opened for reading, if it is an ordinary file that is not empty.

    Special files are told apart by ``stat`` and never opened; a name swapped in between is caught on the open file.

    Raises:
        InputError: the path does not exist, is a folder, a pipe, a socket or a device, is empty, or cannot be read.
    """
    try:
        _require_regular(os.stat(path).st_mode)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise InputError("there is no such file", hint=_did_you_mean(path)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"the file cannot be read ({_reason(error)})") from None
    handle = os.fdopen(descriptor, "rb")
    try:
        status = os.fstat(descriptor)
        _require_regular(status.st_mode)
        if status.st_size == 0:
            raise InputError("the file is empty (0 bytes)", needed=_READABLE, hint="Download or save it again.")
    except BaseException:
        handle.close()
        raise
    return handle


def recognise(handle: BinaryIO) -> FileFormat:
    """Return the format of an open file, judged by content.

    Raises:
        InputError: the content is something else; the message names it where it is known.
        DamagedFileError: the file starts as a zip archive and has no readable table of contents.
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    head = handle.read(_HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(handle)
    for magic, kind, hint in _FOREIGN_HEADS:
        if head.startswith(magic):
            raise InputError(f"this is {kind}", needed=_READABLE, hint=hint)
    if _looks_like_safetensors(head, size):
        return FileFormat.SAFETENSORS
    if _opens_legacy_checkpoint(head):
        return FileFormat.TORCH_LEGACY
    if head.lstrip()[:1] == b"{" and b'"weight_map"' in _text(handle):
        return FileFormat.INDEX
    raise InputError(*_unknown(head, size))


def _text(handle: BinaryIO) -> bytes:
    handle.seek(0)
    return handle.read(_MOST_INDEX_BYTES)


def _unknown(head: bytes, size: int) -> tuple[str]:
    start = head.lstrip()[:64].lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (f"this is an HTML page, perhaps a failed download; needed: {_READABLE}",)
    if opens_onnx(head):
        return (f"this is an ONNX model; needed: {_READABLE}. {_ONNX_HINT}",)
    if (head.startswith(b"\x80") and len(head) > 1 and head[1] <= 5) or _is_pickle_of_text(head):
        return (f"this is a bare pickle, not a torch checkpoint; needed: {_READABLE}. Save it with torch.save.",)
    if start.startswith((b"{", b"[")):
        return (f"this is JSON text; needed: {_READABLE}",)
    if head[257:262] == b"ustar":
        return (f"this is a tar archive; needed: {_READABLE}. Unpack it first.",)
    if _is_text(head):
        first = head[:24].decode("ascii").splitlines()[0]
        return (f"this is text that starts with {first!r}; needed: {_READABLE}",)
    return (f"the format is not known ({size} bytes that start with {head[:8].hex(' ')}); needed: {_READABLE}",)


def _is_pickle_of_text(head: bytes) -> bool:
    """Whether a whole pickle of protocol 0, which has no magic number, is in the head."""
    import pickletools

    try:
        # Only listed: nothing of it is carried out.
        return sum(1 for _ in pickletools.genops(head)) > 1
    except (ValueError, OverflowError, MemoryError):
        return False


def _is_text(head: bytes) -> bool:
    return head.isascii() and all(chr(byte).isprintable() or chr(byte).isspace() for byte in head)


def _recognise_zip(handle: BinaryIO) -> FileFormat:
    handle.seek(0)
    try:
        with zipfile.ZipFile(handle) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
            whole = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError):
        raise DamagedFileError(
            "the zip archive has no readable table of contents: the file is cut short or damaged",
            hint="Download or save it again.",
        ) from None
    inner = set(names)
    if "archive_format" in inner or any(n.startswith("models/") and n.endswith(".json") for n in names):
        return FileFormat.EXPORTED
    if "serialized_exported_program.json" in inner | whole:
        raise InputError("this is a torch.export program of torch 2.7 or older", hint="Export it again with torch 2.9.")
    if "constants.pkl" in inner or any(n.startswith("code/") for n in names):
        return FileFormat.TORCHSCRIPT
    if "data.pkl" in inner:
        return FileFormat.TORCH_ZIP
    if any(n.endswith(".npy") for n in names):
        raise InputError("this is a numpy .npz archive", needed=_READABLE)
    raise InputError("this is a zip archive that holds no model", needed=_READABLE, hint="Unpack it first.")


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    if len(head) < 9 or head[8:9] != b"{":
        return False
    # A header longer than the file is still this format, only cut short: the reader says so.
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= max(size, 100_000_000)


def _opens_legacy_checkpoint(head: bytes) -> bool:
    # The first pickle is the magic number: as bytes, or as decimal digits in protocols 0 and 1.
    as_bytes = head.startswith(b"\x80") and LEGACY_MAGIC.to_bytes(10, "little") in head[:32]
    return as_bytes or head.startswith(b"L%dL\n." % LEGACY_MAGIC)


def opens_onnx(head: bytes) -> bool:
    """Whether a file that starts with ``head`` is an ONNX model."""
    # A protobuf ModelProto opens with field 1 (ir_version, a small number), then any of its texts, or its graph.
    after = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)
    return len(head) > 4 and head[0] == 0x08 and head[1] <= 20 and head[2] in after


def _require_regular(mode: int) -> None:
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    for matches, kind in kinds:
        if matches(mode):
            raise InputError(f"this is {kind}", needed="an ordinary file")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "the name is not valid"


def _did_you_mean(path: Path) -> str | None:
    folder = path.parent
    try:
        if not folder.is_dir():
            return f"The folder {quoted(folder)} does not exist either."
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, 10_000)]
    except OSError:
        return None
    return _suggestion(path.name, names)


def _suggestion(wanted: str, names: list[str]) -> str | None:
    """Return "Did you mean …?" for the names nearest to ``wanted``: other case, other suffix, a typing error.

    >>> _suggestion("model.pt", ["notes.txt", "Model.pt", "model.pth"])
    'Did you mean Model.pt, model.pth?'
    """
    folded = wanted.casefold()
    same_case = [n for n in names if n.casefold() == folded]
    same_stem = [n for n in names if Path(n).stem.casefold() == Path(wanted).stem.casefold()]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.75)
    best = sorted(same_case) + sorted(same_stem) + near
    unique = list(dict.fromkeys(best))[:3]
    return f"Did you mean {', '.join(quoted(n) for n in unique)}?" if unique else None
