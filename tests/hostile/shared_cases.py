"""Small pickles that name one large thing many times: a list, a text, a state or a module, each use of it costly."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tests.checkpoint.hostile_files import checkpoint
from tests.hostile.case import Case

_TIMES = 100_000
_TEXT = b"X" + struct.pack("<I", 1 << 20) + b"n" * (1 << 20)
_LINEAR = b"ctorch.nn.modules.linear\nIdentity\n"


def _memo(value: bytes, place: int) -> bytes:
    """Return opcodes that make a value, remember it at a place, and leave nothing on the stack."""
    return value + b"q" + bytes([place]) + b"0"


def _numbers(count: int, end: bytes) -> bytes:
    return b"(" + b"".join(b"J" + struct.pack("<I", n) for n in range(count)) + end


def _repeated(*steps: bytes, times: int = _TIMES) -> Callable[[Path], object]:
    """Return a writer of a pickle: all steps but the last, and the last so many times, the value dropped each time."""
    return lambda path: checkpoint(path, b"\x80\x02" + b"".join(steps[:-1]) + (steps[-1] + b"0") * times + b"}.")


def _tensor(size: bytes) -> bytes:
    return b"h\x00(h\x01K\x00" + size + size + b"\x89NtR"


def _module(state: bytes) -> bytes:
    return b"h\x00)\x81" + state + b"b"


def _tables(parameters: bytes, modules: bytes = b"}") -> bytes:
    return b"}(U\x08_modules" + modules + b"U\x0b_parameters" + parameters + b"U\x08_buffers}u"


_STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x00tQ"
_NAMED = b"}(" + b"".join(b"U\x06%06dN" % n for n in range(150_000)) + b"u"
_COSTLY = "in all; needed: at most"


def _nested_modules(levels: int) -> Callable[[Path], object]:
    """Return a writer of modules that hold the one below them twice: 2**levels by their paths."""

    def write(path: Path) -> None:
        module: nn.Module = nn.Sequential(nn.ReLU())
        for _ in range(levels):
            module = nn.Sequential(module, module)
        torch.save(nn.Sequential(nn.Conv2d(1, 1, 1), module).eval(), path)

    return write


def _shared(attribute: str) -> Callable[[Path], object]:
    """Return a writer of two modules that share their whole state, or a table in it."""
    one, other = nn.Identity(), nn.Identity()
    setattr(other, attribute, getattr(one, attribute))
    return lambda path: torch.save(nn.Sequential(nn.Conv2d(1, 1, 1), one, other).eval(), path)


TABLE = [
    ("one list in many dicts",
     _repeated(_memo(b"(U\x01aN\x86q\x03" + b"h\x03" * 300_000 + b"l", 0), _memo(b"ccollections\nOrderedDict\n", 1),
               b"h\x01h\x00\x85R"), _COSTLY),
    ("one list in many sets",
     _repeated(_memo(_numbers(300_000, b"l"), 0), _memo(b"c__builtin__\nset\n", 1), b"h\x01h\x00\x85R"), _COSTLY),
    ("one text in many bytes",
     _repeated(_memo(_TEXT, 0), _memo(b"U\x06latin1", 1), _memo(b"c_codecs\nencode\n", 2), b"h\x02h\x00h\x01\x86R"),
     _COSTLY),
    ("one size of many tensors",
     _repeated(_memo(b"ctorch._utils\n_rebuild_tensor_v2\n", 0), _memo(_STORAGE, 1), _memo(_numbers(300_000, b"t"), 2),
               _tensor(b"h\x02")), f"{_COSTLY}|do not fit"),
    ("one torch.Size of many tensors",
     _repeated(_memo(b"ctorch._utils\n_rebuild_tensor_v2\n", 0), _memo(_STORAGE, 1),
               _memo(b"ctorch\nSize\n" + _numbers(300_000, b"t") + b"\x85R", 2), _tensor(b"h\x02")),
     f"{_COSTLY}|do not fit"),
    ("one text many times in a device",
     _repeated(_memo(_TEXT, 0), _memo(b"(" + b"h\x00" * _TIMES + b"t", 1), b"ctorch\ndevice\nh\x01R", times=3),
     _COSTLY),
    # Modules that nothing uses are left alone, so that these cost nothing.
    ("one state of many modules", _repeated(_memo(_LINEAR, 0), _memo(_tables(_NAMED), 1), _module(b"h\x01")),
     "no weights"),
    ("one table of many modules",
     _repeated(_memo(_LINEAR, 0), _memo(_NAMED, 1), _module(_tables(b"h\x01")), times=40_000), "no weights"),
    ("one state of two modules", _shared("__dict__"), "share one"),
    ("one table of two modules", _shared("_parameters"), "share one table of parameters"),
    ("modules that double 60 times", _nested_modules(60), "hold one another"),
    ("modules that double 13 times", _nested_modules(13), "hold one another"),
    ("modules that double 8 times", _nested_modules(8), ""),
]  # fmt: skip

CASES = tuple(Case(name, write, reason) for name, write, reason in TABLE)
