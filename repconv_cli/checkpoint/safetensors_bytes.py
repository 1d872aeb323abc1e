"""Tensors as the bytes of a safetensors file, the same bytes every time, and the check that they read back.

The library's own writer is not used: with several metadata keys its output changes from run to run, and it cannot
write to a file that is open already. Its reader, which shares no code with this, is the check.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.safetensors_file import DTYPES, ITEM_BYTES, MOST_HEADER_BYTES
from repconv_cli.errors import OutputError

_NAMES = {getattr(torch, name): short for short, name in DTYPES.items()}
_ALIGNMENT = 8
_GROUP_BYTES = 64 << 20


def chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Return the file piece by piece: the header, then each tensor, one copy in memory at a time.

    Wide elements come first, then names in order, so that every tensor is aligned and the order is always the same.

    Raises:
        OutputError: there is no tensor, or one has a name or a type that the format cannot hold.
    """
    _check(tensors, metadata)
    ordered = sorted(tensors, key=lambda name: (-ITEM_BYTES[_NAMES[tensors[name].dtype]], name))
    yield _header(ordered, tensors, metadata)
    for name in ordered:
        if tensors[name].numel():
            yield _bytes_of(tensors[name])


def require_same(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    release: Callable[[], None] | None = None,
) -> None:
    """Check that the safetensors library reads exactly ``tensors`` and ``metadata`` from ``path``.

    The file is opened anew for every few tensors: what the library has mapped stays in memory until it is closed.
    ``release`` is called as often, and may let go of the memory of the tensors that were compared.

    Raises:
        OutputError: it cannot, or anything differs by a bit.
    """
    from safetensors import SafetensorError, safe_open

    try:
        for group in _groups(tensors):
            with safe_open(path, framework="pt", device="cpu") as opened:
                same = set(opened.keys()) == set(tensors) and (opened.metadata() or {}) == dict(metadata)
                wrong = [name for name in group if not _is_same(opened.get_tensor(name), tensors[name])] if same else []
            if not same or wrong:
                break
            if release is not None:
                release()
    except (SafetensorError, OSError, RuntimeError, ValueError):
        raise OutputError("what was written cannot be read back", hint="Is the disk full or failing?") from None
    if not same or wrong:
        found = f"tensor {quoted(wrong[0])}" if wrong else "the table of tensors"
        raise OutputError(f"{found} reads back differently from what was written", hint="Is the disk failing?")


def _groups(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Return the names in groups of about ``_GROUP_BYTES`` each."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        group.append(name)
        size += tensor.numel() * tensor.element_size()
        if size > _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _check(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    if not tensors:
        raise OutputError("there are no tensors to write")
    for name, tensor in tensors.items():
        if not name or name == "__metadata__":
            raise OutputError(f"a tensor cannot be called {quoted(name) or 'nothing'} in a safetensors file")
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
            raise OutputError(f"tensor {quoted(name)} ({tensor.dtype}) cannot be stored in a safetensors file")
    texts = (*tensors, *metadata, *metadata.values())
    if not all(_is_text(text) for text in texts):
        raise OutputError("a name or a note is not valid text", needed="text that UTF-8 can hold")


def _header(ordered: list[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    begin = 0
    for name in ordered:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
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


def _is_same(read_back: torch.Tensor, written: torch.Tensor) -> bool:
    if read_back.shape != written.shape or read_back.dtype != written.dtype:
        return False
    return not written.numel() or torch.equal(_raw(read_back), _raw(written))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
