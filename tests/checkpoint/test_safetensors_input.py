"""safetensors files: the same bits as the library reads, and headers that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from repconv_cli.checkpoint import FileFormat, read
from repconv_cli.errors import DamagedFileError, InputError
from tests.checkpoint.tensor_checks import same_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_tensors_have_the_bits_the_library_reads(tmp_path: Path) -> None:
    tensors = {f"layer.{dtype}": torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "é": torch.ones(1)}
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt", "a": "b"})
    source, wanted = read(tmp_path / "w.safetensors"), load_file(tmp_path / "w.safetensors")
    assert (source.kind, source.format) == ("weights", FileFormat.SAFETENSORS)
    assert source.metadata == {"format": "pt", "a": "b"}
    assert source.tensors is not None
    same_tensors(source, {name: wanted[name] for name in source.tensors})
    assert set(source.tensors) == set(wanted)


def test_prefixes_are_taken_off_here_too(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert list(read(tmp_path / "w.safetensors").tensors or {}) == ["a"]


def f32(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = [
    ("hole", {"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, DamagedFileError, "after bytes that belong to no tensor"),
    ("overlap", {"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, DamagedFileError, "overlaps"),
    ("shape", {"a": f32(0, 12, 4)}, DamagedFileError, "has 12 bytes; needed: 16"),
    ("negative", {"a": f32(0, 12, -3)}, DamagedFileError, "no possible shape"),
    ("huge", {"a": f32(0, 12, 1 << 40, 1 << 40)}, DamagedFileError, "has 12 bytes"),
    ("backwards", {"a": f32(12, 0, 3)}, DamagedFileError, "has -12 bytes"),
    ("left over", {"a": f32(0, 4, 1)}, DamagedFileError, "take 4 bytes and the file has 12"),
    ("too long", {"a": f32(0, 400, 100)}, DamagedFileError, "take 400 bytes and the file has 12"),
    ("dtype", {"a\x1b": {"dtype": "F4", "shape": [24], "data_offsets": [0, 12]}}, InputError, r"a\\x1b is of type F4"),
    ("field", {"a": {**f32(0, 12, 3), "pickle": 1}}, DamagedFileError, "not a table of tensors"),
    ("metadata", {"a": f32(0, 12, 3), "__metadata__": {"a": 1}}, DamagedFileError, "not a table of tensors"),
]


@pytest.mark.parametrize(("header", "kind", "reason"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_header_that_lies_is_refused(tmp_path: Path, refused, header, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "w", json.dumps(header).encode())
    refused(tmp_path / "w", kind, reason)


def write(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(12))


TEXTS = [
    ("name twice", b'{"a":{"dtype":"U8","shape":[12],"data_offsets":[0,12]},"a":{}}', "not a table"),
    ("cut", b'{"a":{"dtype":', "not a table"),
    ("nested", b'{"a":' * 50_000, "not a table"),
]


@pytest.mark.parametrize(("text", "reason"), [t[1:] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_a_header_that_is_not_one_is_refused(tmp_path: Path, refused, text: bytes, reason: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "w", text)
    refused(tmp_path / "w", DamagedFileError, reason)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "w", b"{}", length=90_000_000)
    refused(tmp_path / "w", DamagedFileError, "header claims 90000000 bytes")


def test_a_cut_off_file_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    save_file({"a": torch.ones(100)}, tmp_path / "w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-1])
    refused(tmp_path / "w", DamagedFileError, "take 400 bytes and the file has 399")


def test_no_tensors_and_no_state_key(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "w").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(tmp_path / "w", InputError, "holds no tensors")
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "n")
    refused(tmp_path / "n", InputError, "a holds 1 values of 1")
    refused(tmp_path / "n", InputError, "chooses an entry of a torch checkpoint", state_key="ema")
