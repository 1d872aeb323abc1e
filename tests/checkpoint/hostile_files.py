"""Makers of small files that a reader must refuse, and of the zip archives around them."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Pickles as a call of ``function`` with ``arguments``: what REDUCE runs in an ordinary unpickler."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zip_file(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive with these members and return its path."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def checkpoint(path: Path, data_pkl: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a torch zip checkpoint with this pickle and these storages."""
    members = {"archive/data.pkl": data_pkl, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return zip_file(path, members | {f"archive/data/{key}": content for key, content in (storages or {}).items()})


def pickled(value: Any, protocol: int = 2) -> bytes:
    """Return the pickle of ``value``, with storages left as persistent ids of the class ``Stored``."""
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            return item.identity if isinstance(item, Stored) else None

    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


class Stored:
    """A storage as a checkpoint's pickle refers to it: ``count`` elements under ``key``."""

    def __init__(self, key: str, count: int, kind: Any = torch.FloatStorage) -> None:
        self.identity = ("storage", kind, key, "cpu", count)


def tensor_claim(stored: Stored, offset: Any, size: Any, stride: Any) -> Calls:
    """Return what pickles as a tensor with this geometry, true or not."""
    return Calls(torch._utils._rebuild_tensor_v2, stored, offset, size, stride, False, None)
