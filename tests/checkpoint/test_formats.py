"""Content decides what a file is, and a refusal says what it is instead."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from repconv_cli.checkpoint import FileFormat, read
from repconv_cli.checkpoint.formats import open_regular, recognise
from repconv_cli.errors import DamagedFileError, InputError
from tests.checkpoint.hostile_files import zip_file


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return buffer.getvalue()


ONNX_HEAD = b"\x08\x08\x12\x07pytorch\x1a\x032.9:\x04"

OTHERS = [
    ("git-LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-LFS pointer.*git lfs pull"),
    ("HTML", b"\n<!DOCTYPE html>\n<html>404</html>", "HTML page"),
    ("gzip", gzip.compress(b"x"), "gzip"),
    ("GGUF", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    ("ONNX", ONNX_HEAD + bytes(64), "ONNX"),
    ("numpy", npy(), "numpy array"),
    ("tar", tar(), "tar archive"),
    ("JSON", b'{"weights": {}}', "JSON"),
    ("pickle", pickle.dumps({"a": 1}), "bare pickle"),
    ("empty", b"", r"empty \(0 bytes\)"),
    ("text", b"hello world,\nhello world", r"this is text that starts with 'hello world,'; needed: a torch"),
    ("binary", bytes(range(1, 255)), "format is not known"),
]


@pytest.mark.parametrize(("content", "reason"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "model.pt2"])
def test_other_formats_are_named_whatever_the_extension(tmp_path: Path, refused, content, reason: str, name) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, InputError, reason)


ARCHIVES = [
    ("npz", {"a.npy": npy()}, InputError, "npz"),
    ("zip", {"readme.txt": b"x"}, InputError, "holds no model"),
    ("old export", {"serialized_exported_program.json": b"{}"}, InputError, "torch 2.7 or older"),
    ("script", {"m/constants.pkl": b"", "m/data.pkl": b"N."}, InputError, "TorchScript archive holds no module"),
]


@pytest.mark.parametrize(("members", "kind", "reason"), [a[1:] for a in ARCHIVES], ids=[a[0] for a in ARCHIVES])
def test_other_archives_are_named(tmp_path: Path, refused, members, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    refused(zip_file(tmp_path / "model.pt", members), kind, reason)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told_apart_from_a_checkpoint(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), str(tmp_path / "m.pt"))
    with open_regular(tmp_path / "m.pt") as handle:
        assert recognise(handle) is FileFormat.TORCHSCRIPT


def test_a_missing_file_suggests_near_names(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    for name in ("Model.pt", "model.pth", "other.txt"):
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / "model.pt", InputError, "no such file. Did you mean Model.pt, model.pth")
    refused(tmp_path / "modle.pth", InputError, "Did you mean model.pth")
    refused(tmp_path / "nowhere" / "model.pt", InputError, "does not exist either")


def test_names_with_control_characters_are_escaped(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a\x1b[31m\n.pt").write_bytes(b"x")
    refused(tmp_path / "a\x1b[31m\n.pt", InputError, r"a\\x1b\[31m\\n\.pt: this is text")
    refused(tmp_path / "a\x1b[31m\n.pth", InputError, r"Did you mean a\\x1b")


def test_special_files_are_never_opened(tmp_path: Path, refused, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    os.mkfifo(tmp_path / "pipe.pt")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.pt")
        refused(tmp_path / "socket.pt", InputError, "this is a socket")
    refused(tmp_path / "pipe.pt", InputError, "this is a named pipe")
    refused(tmp_path, InputError, "this is a folder")
    refused(tmp_path / "x" / "\0", InputError, "cannot be read")


def test_a_file_with_the_wrong_extension_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read(tmp_path / "w.safetensors").format is FileFormat.TORCH_ZIP


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_a_cut_off_checkpoint_is_damaged(tmp_path: Path, refused, keep: float) -> None:  # type: ignore[no-untyped-def]
    torch.save({"w": torch.ones(500)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: int(len(content) * keep)])
    refused(tmp_path / "w.pt", DamagedFileError, "cut short or damaged")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, repconv_cli.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
