"""Pickles that make the marker in an ordinary unpickler, one for each way in which opcodes can run code."""

from __future__ import annotations

import copyreg
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.checkpoint.hostile_files import Calls

_EXTENSION = 0x7F


def _text(path: Path) -> bytes:
    return b"S'" + str(path).encode() + b"'\n"


def by_opcode(marker: Path) -> dict[str, bytes]:
    """Return handwritten pickles by the opcode that runs the call."""
    path, mkdir = _text(marker), b"cposix\nmkdir\n"
    # An iterator of calls, and a tuple made from it, which makes the calls: no class is ever called.
    lazy = b"cbuiltins\ntuple\n(cbuiltins\nmap\n(" + mkdir + b"](" + path + b"et%s" + b"t%s."
    partial = b"\x80\x02cfunctools\npartial\n(cposix\ngetcwd\nt\x81(" + mkdir + b"(" + path + b"t}}tb"
    short = b"\x8c\x05posix\x8c\x05mkdir\x93"
    return {
        "REDUCE": mkdir + b"(" + path + b"tR.",
        "INST": b"(" + path + b"iposix\nmkdir\n.",
        "OBJ": b"(" + mkdir + path + b"o.",
        "NEWOBJ": b"\x80\x02" + lazy % (b"\x81", b"\x81"),
        "NEWOBJ_EX": b"\x80\x04" + lazy % (b"}\x92", b"}\x92"),
        "BUILD": partial + b")R.",
        "STACK_GLOBAL": b"\x80\x04" + short + b"(" + path + b"tR.",
        "EXT1": b"\x80\x02\x82\x7f(" + path + b"tR.",
        "EXT2": b"\x80\x02\x83\x7f\x00(" + path + b"tR.",
        "EXT4": b"\x80\x02\x84\x7f\x00\x00\x00(" + path + b"tR.",
        "memo": mkdir + b"p0\n0g0\n(" + path + b"tR.",
        "in a key": b"}" + mkdir + b"(" + path + b"tRNs.",
        "in a set": b"\x80\x04\x8f(" + mkdir + b"(" + path + b"tR\x90.",
        "dropped": mkdir + b"(" + path + b"tR0}.",
        "renamed module": b"cos\nmkdir\n(" + path + b"tR.",
        "nested call": b"cbuiltins\ngetattr\n(cposix\n__dict__\nS'get'\ntR(S'mkdir'\ntR(" + path + b"tR.",
    }


def by_protocol(marker: Path, protocol: int) -> bytes:
    """Return what Python's own pickler writes for a call beside a weight."""
    return pickle.dumps({"0.weight": 1.0, "x": Calls(os.mkdir, str(marker))}, protocol)


@contextmanager
def extension_registered() -> Iterator[None]:
    """Make the extension opcodes stand for the payload, as a program that registers extensions would."""
    copyreg.add_extension("posix", "mkdir", _EXTENSION)
    try:
        yield
    finally:
        copyreg.remove_extension("posix", "mkdir", _EXTENSION)
