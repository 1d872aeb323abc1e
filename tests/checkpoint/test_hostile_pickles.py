"""Pickles made to run code or to take memory. Each payload would make a folder; it must never appear."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import textwrap
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repconv_cli.checkpoint import read
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError
from tests.checkpoint.hostile_files import Calls, Stored, checkpoint, pickled, tensor_claim

Refused = Callable[..., InputError]


@pytest.fixture
def marker(tmp_path: Path) -> Any:
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code from the file has run"


def handwritten(style: str, marker: Path) -> bytes:
    text = str(marker).encode()
    return {
        "REDUCE": b"cposix\nmkdir\n(S'" + text + b"'\ntR.",
        "INST": b"(S'" + text + b"'\niposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\nS'" + text + b"'\no.",
        "NEWOBJ": b"\x80\x02cposix\nmkdir\n(S'" + text + b"'\nt\x81.",
        "NEWOBJ_EX": b"\x80\x04cposix\nmkdir\n(S'" + text + b"'\nt}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93(S'" + text + b"'\ntR.",
        "BUILD": b"cposix\nmkdir\n(S'" + text + b"'\ntR}(S'a'\nI1\nub.",
        "in a dict": b"}(S'weight'\ncposix\nmkdir\n(S'" + text + b"'\ntRu.",
        "named only": b"cposix\nmkdir\n.",
    }[style]


STYLES = ["REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "BUILD", "in a dict", "named only"]


@pytest.mark.parametrize("style", STYLES)
def test_a_foreign_name_is_refused_by_name(tmp_path: Path, marker: Path, refused: Refused, style: str) -> None:
    path = checkpoint(tmp_path / "w.pt", handwritten(style, marker))
    refused(path, UnsafeFileError, r"posix\.mkdir")


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_refused_in_every_protocol(tmp_path: Path, marker: Path, refused: Refused, protocol: int) -> None:
    value = {"weight": torch.Size([1]), "x": Calls(os.mkdir, str(marker))}
    path = checkpoint(tmp_path / "w.pt", pickled(value, protocol))
    refused(path, UnsafeFileError, "posix.mkdir")


@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_a_call_in_any_pickle_of_a_legacy_file_is_refused(
    tmp_path: Path, marker: Path, refused: Refused, place: int
) -> None:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"w": 1}, []]
    parts[place] = [parts[place], Calls(os.mkdir, str(marker))]
    path = tmp_path / "w.pt"
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    refused(path, UnsafeFileError, "posix.mkdir")


def test_all_foreign_names_are_listed_escaped_and_cut(tmp_path: Path, refused: Refused) -> None:
    names = [b"c" + b"evil\x1b[31m%d" % n + b"\nrun\n0" for n in range(12)]
    path = checkpoint(tmp_path / "w.pt", b"".join(names) + b"c" + b"long" * 999 + b"\nx\n0N.")
    error = refused(path, UnsafeFileError, r"evil\\x1b\[31m0\.run, .* and 3 more; needed: tensors")
    assert "state_dict()" in (error.hint or "")


def with_state(module: nn.Module, **state: Any) -> bytes:
    """Pickle a module whose state has been added to."""
    module.__dict__.update(state)
    return pickle.dumps(module, 2)


UNSAFE_STATES = [
    ("forward hook", {"_forward_hooks": OrderedDict({0: F.relu})}, "hooks"),
    ("pre hook", {"_forward_pre_hooks": {0: F.relu}}, "hooks"),
    ("state dict hook", {"_state_dict_hooks": {0: F.relu}}, "hooks"),
    ("load hook", {"_load_state_dict_pre_hooks": {0: F.relu}}, "hooks"),
    ("unknown hooks", {"_some_new_hooks": [F.relu]}, "hooks"),
    ("forward", {"forward": F.relu}, "replaces its own forward"),
    ("call", {"__call__": F.relu}, "replaces its own __call__"),
    ("compiled call", {"_wrapped_call_impl": F.relu}, "replaces its own _wrapped_call_impl"),
    ("method", {"_conv_forward": F.relu}, "hides its own _conv_forward"),
    ("property-like", {"named_children": 1}, "hides its own named_children"),
    ("class", {"__class__": 1}, "replaces its own __class__"),
]


@pytest.mark.parametrize(("state", "reason"), [s[1:] for s in UNSAFE_STATES], ids=[s[0] for s in UNSAFE_STATES])
def test_a_module_with_code_in_its_state_is_refused(tmp_path: Path, refused, state, reason: str) -> None:  # type: ignore[no-untyped-def]
    module = nn.Conv2d(1, 1, 1, bias=False)
    module._parameters.clear()
    path = checkpoint(tmp_path / "w.pt", with_state(module, **state))
    refused(path, UnsafeFileError, reason)


def test_a_state_changed_after_it_was_given_is_checked_too(tmp_path: Path, refused: Refused) -> None:
    # BUILD takes the dict that stays in the memo, and the hook is put into it only then.
    empty = b"".join(b"U%c%s}" % (len(k), k) for k in (b"_modules", b"_parameters", b"_buffers"))
    data = b"\x80\x02ctorch.nn.modules.linear\nIdentity\n)\x81}q\x00(" + empty + b"ubh\x00"
    data += b"U\x07forwardctorch.nn.functional\nrelu\ns0."
    refused(checkpoint(tmp_path / "w.pt", data), UnsafeFileError, "replaces its own forward")


ADMITTED_CALLS = [
    ("REDUCE", lambda: pickle.dumps(Calls(nn.Linear, 20000, 20000), 2)),
    ("NEWOBJ", lambda: b"\x80\x02ctorch.nn.modules.linear\nLinear\nM\x20\x4eM\x20\x4e\x86\x81."),
    ("INST", lambda: b"(I20000\nI20000\nitorch.nn.modules.linear\nLinear\n."),
    ("OBJ", lambda: b"(ctorch.nn.modules.linear\nLinear\nI20000\nI20000\no."),
    ("activation", lambda: pickle.dumps(Calls(nn.TransformerEncoderLayer, 8, 2, 8, 0.1, "relu"), 2)),
    ("function", lambda: pickle.dumps(Calls(F.relu, 3), 2)),
]


@pytest.mark.parametrize("data", [c[1] for c in ADMITTED_CALLS], ids=[c[0] for c in ADMITTED_CALLS])
def test_calling_what_is_admitted_is_refused(tmp_path: Path, refused: Refused, data: Callable[[], bytes]) -> None:
    path = checkpoint(tmp_path / "w.pt", data())
    refused(path, UnsafeFileError, r"with the file's arguments")


F32 = Stored("0", 4)
SIXTEEN = {"0": struct.pack("<4f", 1, 2, 3, 4)}
FALSE_CLAIMS = [
    ("too few bytes", tensor_claim(Stored("0", 5), 0, (5,), (1,)), "claims 20 bytes and has 16"),
    ("too many bytes", tensor_claim(Stored("0", 3), 0, (3,), (1,)), "claims 12 bytes and has 16"),
    ("no storage", tensor_claim(Stored("1", 4), 0, (4,), (1,)), "no member archive/data/1"),
    ("past the end", tensor_claim(F32, 1, (4,), (1,)), "needs 5 elements, which holds 4"),
    ("stride", tensor_claim(F32, 0, (2, 2), (3, 1)), "needs 5 elements"),
    ("negative offset", tensor_claim(F32, -1, (4,), (1,)), "do not fit together"),
    ("negative stride", tensor_claim(F32, 3, (4,), (-1,)), "whole numbers"),
    ("negative size", tensor_claim(F32, 0, (-4,), (1,)), "whole numbers"),
    ("size is a float", tensor_claim(F32, 0, (4.0,), (1,)), "whole numbers"),
    ("size is huge", tensor_claim(F32, 0, (1 << 70,), (1,)), "whole numbers"),
    ("rank", tensor_claim(F32, 0, (4,), (1, 1)), "do not fit together"),
    ("many axes", tensor_claim(F32, 0, (1,) * 99, (1,) * 99), "do not fit together"),
    ("stride-0 giant", tensor_claim(Stored("0", 4), 0, (10_000_000_000,), (0,)), "claims 10000000000 elements"),
    ("claim beyond the file", tensor_claim(Stored("0", 1 << 40), 0, (4,), (1,)), "at most the file's"),
    ("two claims", [tensor_claim(F32, 0, (4,), (1,)), tensor_claim(Stored("0", 2), 0, (2,), (1,))], "in two ways"),
    ("another folder", tensor_claim(Stored("../data.pkl", 4), 0, (4,), (1,)), "no member"),
]


@pytest.mark.parametrize(("value", "reason"), [c[1:] for c in FALSE_CLAIMS], ids=[c[0] for c in FALSE_CLAIMS])
def test_a_tensor_that_the_bytes_do_not_bear_out_is_refused(tmp_path: Path, refused, value, reason: str) -> None:  # type: ignore[no-untyped-def]
    path = checkpoint(tmp_path / "w.pt", pickled({"w": value}), SIXTEEN)
    refused(path, DamagedFileError, reason)


def test_a_true_claim_of_the_same_make_is_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "w.pt", pickled({"w": tensor_claim(F32, 0, (2, 2), (2, 1))}), SIXTEEN)
    tensors = read(path).tensors
    assert tensors is not None
    assert torch.equal(tensors["w"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def self_containing_module() -> bytes:
    module = nn.Sequential()
    module._modules["0"] = module
    return pickle.dumps(module, 2)


def module_with(attribute: bytes) -> bytes:
    """Return the pickle of an Identity that has one more attribute, given as opcodes."""
    tables = b"".join(b"U%c%s}" % (len(k), k) for k in (b"_modules", b"_parameters", b"_buffers"))
    return b"\x80\x02ctorch.nn.modules.linear\nIdentity\n)\x81}(" + tables + b"U\x04more" + attribute + b"ub."


MALFORMED = [
    ("empty", b"", DamagedFileError, "not well-formed"),
    ("no end", b"\x80\x02}", DamagedFileError, "not well-formed"),
    ("unknown opcode", b"\x80\x02\xff.", DamagedFileError, "not well-formed"),
    ("memo never put", b"\x80\x02h\x07.", DamagedFileError, "not well-formed"),
    ("huge memo index", b"\x80\x02Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7f.", InputError, "holds a None"),
    ("unmatched mark", b"\x80\x02(.", DamagedFileError, "not well-formed"),
    ("claims 4 GB of text", b"\x80\x02X\xff\xff\xff\xff.", DamagedFileError, "not well-formed"),
    ("claims 2**60 bytes", b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".", DamagedFileError, "not well-formed"),
    ("bytearray of 3 GiB", pickle.dumps(Calls(bytearray, 3 << 30), 2), UnsafeFileError, "builtins.bytearray"),
    ("FloatTensor(n)", b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", UnsafeFileError, "torch.FloatTensor"),
    ("deep list", nested(100_000), InputError, "holds a list"),
    ("list in itself", b"\x80\x02]q\x00h\x00a.", InputError, "holds a list"),
    ("deep list in a module", module_with(nested(10_000)[2:-1]), DamagedFileError, "nested more than"),
    ("list in itself in a module", module_with(b"]q\x00h\x00a"), DamagedFileError, "contains itself"),
    ("dict in itself", b"\x80\x02}q\x00U\x05modelh\x00s.", InputError, "holds no weights; its entries are model"),
    ("module in itself", self_containing_module(), DamagedFileError, "contains itself"),
    ("module as a key", b"\x80\x02}]Ns.", InputError, "as a key"),
    ("extension registry", b"\x80\x02\x82\x01.", UnsafeFileError, "opcode EXT1"),
    ("number of a million digits", b"I" + b"9" * 1_000_000 + b"\n.", DamagedFileError, "not well-formed"),
    ("module without state", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.", DamagedFileError, "never given"),
    ("module with half a state", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b.", DamagedFileError, "no table"),
]


@pytest.mark.parametrize(("data", "kind", "reason"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_a_malformed_or_greedy_pickle_is_refused(tmp_path: Path, refused, data, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    refused(checkpoint(tmp_path / "w.pt", data), kind, reason)


def test_a_memo_bomb_costs_no_more_than_its_bytes(tmp_path: Path) -> None:
    # Each level holds the one before it ten times; written out it would be 10**60 lists.
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb] * 10
    with pytest.raises(InputError, match="its entries are bomb"):
        read(checkpoint(tmp_path / "w.pt", pickle.dumps({"bomb": bomb}, 2)))


def test_hostile_files_take_little_memory(tmp_path: Path) -> None:
    bombs = {
        "sets.pt": b"\x80\x04" + b"\x8f" * 200_000 + b"N.",
        "bytearray.pt": pickle.dumps(Calls(bytearray, 3 << 30), 2),
        "linear.pt": pickle.dumps(Calls(nn.Linear, 30000, 30000), 2),
        "memo.pt": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "text.pt": b"\x80\x02X\xff\xff\xff\xff.",
        "giant.pt": pickled({"w": tensor_claim(Stored("0", 1), 0, (1 << 33,), (0,))}),
        "claim.pt": pickled({"w": tensor_claim(Stored("0", 1 << 30), 0, (1 << 30,), (1,))}),
    }
    for name, data in bombs.items():
        checkpoint(tmp_path / name, data, {"0": b"abcd"})
    torch.save({"w": torch.ones(1)}, tmp_path / "ok.pt")
    script = """
        import resource, sys
        from repconv_cli.checkpoint import read
        from repconv_cli.errors import InputError
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        read(sys.argv[1])
        before = peak()
        for path in sys.argv[2:]:
            try:
                read(path)
            except InputError:
                continue
            raise SystemExit(f"{path} was read")
        print(peak() - before)
    """
    paths = [str(tmp_path / name) for name in ("ok.pt", *bombs)]
    command = [sys.executable, "-c", textwrap.dedent(script), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "megabytes above start-up"


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_legacy_file_without_all_its_storages_is_refused(tmp_path: Path, refused: Refused, cut: int) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(1000), "b": torch.ones(500)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path, DamagedFileError, "cut short|another size|at most the file's")


def test_a_legacy_storage_of_another_size_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(8)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[:-40] + (7).to_bytes(8, "little") + content[-32:])
    refused(path, DamagedFileError, "another size than its 8 elements")
