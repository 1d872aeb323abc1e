"""The containers that a pickle can lie in, and a small exported program to put things into."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.hostile_files import checkpoint, zip_file
from tests.hostile.case import make_net

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
Edit = Callable[[dict[str, Any]], object]


def legacy(path: Path, data_pkl: bytes, place: int = 3) -> None:
    """Write a checkpoint of the older layout whose pickle number ``place`` is this one."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    parts[place] = data_pkl
    path.write_bytes(b"".join(parts))


def script(path: Path, data_pkl: bytes) -> None:
    """Write a TorchScript archive."""
    members = {"net/data.pkl": data_pkl, "net/constants.pkl": data_pkl, "net/code/__torch__.py": b"import os\n"}
    zip_file(path, members)


def deflated(path: Path, data_pkl: bytes) -> None:
    """Write a checkpoint that was zipped again by hand."""
    zip_file(path, {"archive/data.pkl": data_pkl, "archive/version": b"3\n"}, zipfile.ZIP_DEFLATED)


def bare(path: Path, data_pkl: bytes) -> None:
    """Write nothing but the pickle."""
    path.write_bytes(data_pkl)


def zipped(path: Path, data_pkl: bytes) -> None:
    """Write an ordinary checkpoint."""
    checkpoint(path, data_pkl)


def in_program(*members: str) -> Callable[[Path, bytes], None]:
    """Return a writer of an exported program that holds the pickle under each of these names."""

    def write(path: Path, data_pkl: bytes) -> None:
        program(path, more=dict.fromkeys(members, data_pkl))

    return write


def pickled_payload(path: Path, data_pkl: bytes) -> None:
    """Write an exported program whose first weight is said to be a pickle."""
    key = next(iter(json.loads(exported()[WEIGHTS])["config"]))
    member = json.loads(exported()[WEIGHTS])["config"][key]["path_name"]

    def edit(content: dict[str, Any]) -> None:
        content["config"][key]["use_pickle"] = True

    program(path, {WEIGHTS: edit}, {f"data/weights/{member}": data_pkl})


@functools.cache
def exported() -> Mapping[str, bytes]:
    """Return the members of a program as torch saves it, by name without the folder."""
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch")
    net = torch.export.export(make_net(), (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(net, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def program(path: Path, edits: Mapping[str, Edit] | None = None, more: Mapping[str, bytes] | None = None) -> None:
    """Write the program with these JSON members changed, and with ``more`` members."""
    members = {**exported(), **(more or {})}
    for name, edit in (edits or {}).items():
        content = json.loads(members[name])
        edit(content)
        members[name] = json.dumps(content).encode()
    zip_file(path, {f"net/{name}": content for name, content in members.items()})
