"""``--inputs`` files that nobody vouches for: refused in one clean line, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.hostile_files import Calls
from tests.hostile.case import MARKER, make_net
from tests.hostile.judge import judge


def npy(shape: str, data: bytes, descr: str = "'<f4'") -> bytes:
    """Return a ``.npy`` whose header says ``shape`` and ``descr``."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def stored(table: object, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


CALL = pickle.dumps(Calls(os.mkdir, MARKER))
IMAGE = np.zeros((2, 1, 8, 8), np.float32)
NO_ARRAYS = "cannot be read as .npz arrays of numbers"

CASES: list[tuple[str, Callable[[], bytes], str]] = [
    ("pickle", lambda: CALL, "header claims|table of tensors"),
    ("objects", lambda: npz({"input.npy": npy("(1,)", CALL, "'|O'")}), NO_ARRAYS),
    ("pickle as member", lambda: npz({"input.npy": CALL}), NO_ARRAYS + "|no input of the model"),
    ("record of objects", lambda: npz({"input.npy": npy("(1,)", CALL, "[('a', '|O')]")}), NO_ARRAYS),
    ("code for a shape", lambda: npz({"input.npy": npy(f"__import__('os').mkdir('{MARKER}')", b"")}), NO_ARRAYS),
    ("zip bomb", lambda: npz({"input.npy": npy("(2, 1, 4096, 4096)", bytes(4 << 25))}), r"bytes in a file of"),
    ("shape of 4 TB", lambda: npz({"input.npy": npy("(1000000000000,)", b"1234")}), NO_ARRAYS),
    ("negative shape", lambda: npz({"input.npy": npy("(-1, 1, 8, 8)", IMAGE.tobytes())}), NO_ARRAYS),
    ("cut short", lambda: saved(input=IMAGE)[:-60], NO_ARRAYS),
    ("text", lambda: saved(input=np.array(["a"])), NO_ARRAYS),
    ("empty", lambda: npz({}), "it holds no tensors|" + NO_ARRAYS),
    ("no bytes", lambda: b"", "empty|header"),
    ("wrong name", lambda: saved(image=IMAGE), "it holds image, which is no input of the model"),
    ("control characters", lambda: npz({"\x1b[31m.npy": npy("(1,)", b"1234")}), r"\\x1b.*no input of the model"),
    ("a path", lambda: npz({"../../x.npy": npy("(1,)", b"1234")}), "no input of the model"),
    ("no tensor", lambda: stored({}), "it holds no tensors"),
    ("header of 4 GB", lambda: (4 << 30).to_bytes(8, "little") + b"{}", "header claims 4294967296 bytes"),
    (
        "claimed bytes",
        lambda: stored({"input": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}),
        "its tensors take 4398046511104 bytes and the file has 0",
    ),
    (
        "overlap",
        lambda: stored({k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, b"1234"),
        "overlaps",
    ),
    ("deep", lambda: len(b"[" * 90_000).to_bytes(8, "little") + b"[" * 90_000, "table of tensors"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes such inputs, fused once so that no file is charged for what the first run imports."""
    folder = tmp_path_factory.mktemp("source")
    torch.save(make_net(), folder / "net.pt")
    (folder / "good.npz").write_bytes(saved(input=IMAGE + 1))
    (folder / "out").mkdir()
    found = judge(folder / "net.pt", folder / "out" / "net.safetensors", "--inputs", folder / "good.npz")
    assert (found.code, found.wrong) == (0, []), found.output
    return folder / "net.pt"


@pytest.mark.parametrize(("content", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_hostile_inputs_are_refused_in_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes], reason: str
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "inputs.npz"
    file.write_bytes(content())
    found = judge(source, tmp_path / "out" / "net.safetensors", "--inputs", file)
    assert found.wrong == [], found.output[-2000:]
    assert found.is_refused, found.output[-2000:]
    assert re.search(reason, found.message), found.message
    assert not (tmp_path / MARKER).exists()
