"""Tensors as the bytes of a safetensors file, the same bytes every time, and the check that they read back.

The library's own writer is not used: with several metadata keys its output changes from run to run, and it cannot
write to a file that is open already. Its reader, which shares no code with this, is the check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.safetensors_file import DTYPES, ITEM_BYTES, MOST_HEADER_BYTES
from repconv_cli.checkpoint.writing import Writing
from repconv_cli.errors import OutputError

_NAMES = {getattr(torch, name): short for short, name in DTYPES.items()}
Make = Callable[[str], torch.Tensor]
"""Gives the tensor of a name when it is written."""

_ALIGNMENT = 8
_GROUP_BYTES = 16 << 20


def chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], make: Make | None = None
) -> Iterator[bytes | memoryview]:
    """Return the file piece by piece: the header, then each tensor, one copy in memory at a time.

    Wide elements come first, then names in order, so that every tensor is aligned and the order is always the same.
    With ``make``, of ``tensors`` only the shapes and types are read, and each is made when its turn comes.

    Raises:
        OutputError: there is no tensor, or one has a name or a type that the format cannot hold.
    """
    _check(tensors, metadata, may_be_meta=make is not None)
    yield _header(tensors, metadata)
    for name in _ordered(tensors):
        planned = tensors[name]
        tensor = planned if make is None else make(name)
        if (tensor.shape, tensor.dtype) != (planned.shape, planned.dtype):
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise OutputError(f"tensor {quoted(name)} is {found}", needed=f"{tuple(planned.shape)} of {planned.dtype}")
        if tensor.numel():
            yield _bytes_of(tensor)
        # While the next one is made, this one is of no more use.
        del tensor


def size_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, is_made: bool) -> int:
    """Return how many bytes the file has; with ``is_made`` of ``tensors`` only the shapes and types are read.

    Raises:
        OutputError: as :func:`chunks`.
    """
    _check(tensors, metadata, may_be_meta=is_made)
    return len(_header(tensors, metadata)) + sum(_bytes_in(tensor) for tensor in tensors.values())


def require_same(
    path: Path, written: Writing, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Check that the safetensors library reads from ``path`` what was given to be written, bit for bit.

    Names, shapes, types and ``metadata`` have to be those of ``tensors``, and their bytes as the library reads them,
    after the header, have to give the digest of all that was ``written``. It is read as it is written, in a file that
    has its full length from the start. It is opened anew for every few tensors, or a part of a large one: what the
    library has mapped stays in memory until it is closed.

    Raises:
        OutputError: it cannot, or anything differs by a bit.
    """
    from safetensors import SafetensorError, safe_open

    header = _header(tensors, metadata)
    end = len(header)
    digest = hashlib.sha256(header)
    try:
        written.wait_for(end)
        with path.open("rb") as handle:
            same = handle.read(len(header)) == header
        for group in _groups(tensors):
            end += sum(part.size for part in group)
            written.wait_for(end)
            with safe_open(path, framework="pt", device="cpu") as opened:
                same = same and set(opened.keys()) == set(tensors) and (opened.metadata() or {}) == dict(metadata)
                if not same:
                    break
                for part in group:
                    name, rows = part.name, part.rows
                    found = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
                    same = same and (found.shape, found.dtype) == (part.shape, tensors[name].dtype)
                    digest.update(_bytes_of(found))
                    # It would keep the whole group mapped beside the next.
                    del found
        whole = written.sha256()
    except (SafetensorError, OSError, RuntimeError, ValueError):
        raise OutputError("what was written cannot be read back", hint="Is the disk full or failing?") from None
    if not same or digest.hexdigest() != whole:
        what = "a tensor" if same else "the table of tensors"
        raise OutputError(f"{what} reads back differently from what was written", hint="Is the disk failing?")


def _ordered(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[_NAMES[tensors[name].dtype]], name))


@dataclass(frozen=True)
class _Part:
    """A tensor, or some rows of it, and the bytes that it takes."""

    name: str
    shape: tuple[int, ...]
    size: int
    rows: slice | None = None


def _groups(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[_Part]]:
    """Return the tensors in the file's order, in groups of at most ``_GROUP_BYTES``, or of one row."""
    group: list[_Part] = []
    size = 0
    for name in _ordered(tensors):
        for part in _parts(name, tensors[name]):
            if group and size + part.size > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(part)
            size += part.size
    if group:
        yield group


def _parts(name: str, tensor: torch.Tensor) -> Iterator[_Part]:
    size, shape = _bytes_in(tensor), tuple(tensor.shape)
    if size <= _GROUP_BYTES:
        yield _Part(name, shape, size)
        return
    count = max(1, _GROUP_BYTES * shape[0] // size)
    for start in range(0, shape[0], count):
        rows = slice(start, min(start + count, shape[0]))
        length = rows.stop - rows.start
        yield _Part(name, (length, *shape[1:]), size // shape[0] * length, rows)


def _bytes_in(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, may_be_meta: bool) -> None:
    if not tensors:
        raise OutputError("there are no tensors to write")
    for name, tensor in tensors.items():
        if not name or name == "__metadata__":
            raise OutputError(f"a tensor cannot be called {quoted(name) or 'nothing'} in a safetensors file")
        is_missing = tensor.is_meta and not may_be_meta
        if is_missing or tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
            raise OutputError(f"tensor {quoted(name)} ({tensor.dtype}) cannot be stored in a safetensors file")
    texts = (*tensors, *metadata, *metadata.values())
    if not all(_is_text(text) for text in texts):
        raise OutputError("a name or a note is not valid text", needed="text that UTF-8 can hold")


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    begin = 0
    for name in _ordered(tensors):
        tensor = tensors[name]
        end = begin + _bytes_in(tensor)
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MOST_HEADER_BYTES:
        raise OutputError(f"the header would take {len(text)} bytes", needed=f"at most {MOST_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(_raw(tensor).numpy().data)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if plain.stride() != (1,):
        # One element counts as contiguous whatever its stride.
        plain = plain.clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
