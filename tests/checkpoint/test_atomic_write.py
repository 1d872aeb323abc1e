"""The output is complete under its final name, or not there; what stood there before survives."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from repconv_cli.checkpoint import Writing, check_output, read, safetensors_bytes, write, write_safetensors
from repconv_cli.errors import EXIT_CANNOT_RUN, OutputError

TENSORS = {
    "b.weight": torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), "a.count": torch.tensor(7),
    "half": torch.ones(3).half(), "flag": torch.tensor([True, False, True]), "none": torch.empty(0, 2),
    "brain": torch.ones(2).bfloat16(), "eight": torch.ones(5).to(torch.float8_e4m3fn),
}  # fmt: skip
LARGER = {"a": torch.randn(7, 3, 5), "b": torch.randn(20), "c": torch.tensor(3.0), "d": torch.randn(4, 2).half()}
METADATA = {f"key {n}": f"väl\n{n}" for n in range(8)}


def leftovers(folder: Path, *expected: str) -> list[str]:
    return sorted(set(os.listdir(folder)) - set(expected))


def refused(match: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(OutputError, match=match) as caught:
        write_safetensors(*arguments, **{"force": False, **options})
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == EXIT_CANNOT_RUN


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    done = write_safetensors(tmp_path / "out.safetensors", TENSORS, METADATA, force=False)
    found = load_file(done.path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(done.path, "pt") as opened:
        assert opened.metadata() == METADATA
    content = done.path.read_bytes()
    assert (done.sha256, done.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert leftovers(tmp_path) == ["out.safetensors"]
    source = read(done.path)
    assert source.metadata == METADATA
    assert source.sha256 == done.sha256


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    backwards = [dict(reversed(items.items())) for items in (TENSORS, METADATA)]
    one = write_safetensors(tmp_path / "1", TENSORS, METADATA, force=False)
    two = write_safetensors(tmp_path / "2", *backwards, force=False)
    assert one.sha256 == two.sha256


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    from repconv_cli.checkpoint.safetensors_file import ITEM_BYTES, read_header

    path = write_safetensors(tmp_path / "1", TENSORS, METADATA, force=False).path
    with path.open("rb") as handle:
        header = read_header(handle)
    assert header.data_start % 8 == 0
    assert all(entry.data_offsets[0] % ITEM_BYTES[entry.dtype] == 0 for entry in header.tensors.values())


def test_views_and_shared_memory_are_written_out(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": base.t(), "column": base[:, 1], "again": base, "spread": base[:1].expand(5, 4)}
    path = write_safetensors(tmp_path / "1", tensors, {}, force=False).path
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.text(max_size=8), max_size=4))
def test_any_text_is_kept_as_metadata_or_refused(tmp_path_factory: pytest.TempPathFactory, notes) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("notes") / "1"
    write_safetensors(path, {"w": torch.ones(1)}, notes, force=False)
    assert read(path).metadata == notes


REFUSED_TENSORS = [
    ("none", {}, "no tensors"),
    ("reserved", {"__metadata__": torch.ones(1)}, "cannot be called __metadata__"),
    ("nameless", {"": torch.ones(1)}, "cannot be called nothing"),
    ("meta", {"w": torch.ones(1, device="meta")}, "w .*cannot be stored"),
    ("sparse", {"w\x1b": torch.eye(2).to_sparse()}, r"w\\x1b .*cannot be stored"),
    ("type", {"w": torch.ones(1, dtype=torch.complex128)}, "complex128.*cannot be stored"),
    ("text", {"\ud800": torch.ones(1)}, "not valid text"),
]


@pytest.mark.parametrize(("tensors", "reason"), [r[1:] for r in REFUSED_TENSORS], ids=[r[0] for r in REFUSED_TENSORS])
def test_tensors_that_the_format_cannot_hold_are_refused(tmp_path: Path, tensors, reason: str) -> None:  # type: ignore[no-untyped-def]
    refused(reason, tmp_path / "out", tensors, {})
    assert leftovers(tmp_path) == []


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"before")
    os.utime(out, (0, time.time() - 130))
    refused(r"exists already \(6 B, 2 minutes old\); nothing was written. --force overwrites it", out, TENSORS, {})
    assert out.read_bytes() == b"before"
    write_safetensors(out, TENSORS, {}, force=True)
    assert read(out).kind == "weights"


def test_the_input_is_never_overwritten_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"weights")
    (tmp_path / "soft").symlink_to("in")
    (tmp_path / "softer").symlink_to("soft")
    os.link(source, tmp_path / "hard")
    monkeypatch.chdir(tmp_path)
    for name in ("in", "soft", "softer", "hard", "./in", str(source)):
        refused("the output is the input", name, TENSORS, {}, force=True, source=source)
        refused("the output is the input", name, TENSORS, {}, force=True, source=tmp_path / "soft")
    assert source.read_bytes() == b"weights"


def test_special_files_and_folders_are_never_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    refused("is a folder", tmp_path / "folder", TENSORS, {}, force=True)
    refused("pipe, socket or device", tmp_path / "pipe", TENSORS, {}, force=True)
    refused("there is no folder", tmp_path / "missing" / "out", TENSORS, {})
    refused("Not a directory|not a folder", tmp_path / "file" / "out", TENSORS, {})
    refused("cannot be written|pipe, socket or device", tmp_path / "loop", TENSORS, {}, force=True)
    refused("name is not valid", tmp_path / "a\0b", TENSORS, {})
    refused("too long", tmp_path / ("n" * 300), TENSORS, {})
    assert leftovers(tmp_path) == ["file", "folder", "loop", "pipe"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for before in (b"before", None):
        target, link = tmp_path / "deep" / f"target-{before is None}", tmp_path / f"link-{before is None}"
        link.symlink_to(target)
        if before:
            target.write_bytes(before)
        done = write_safetensors(link, TENSORS, {}, force=True)
        assert done.path == target
        assert link.is_symlink()
        assert read(link).kind == "weights"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_what_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        done = write_safetensors(tmp_path / "out", TENSORS, {}, force=False)
    finally:
        os.umask(before)
    assert done.mode == 0o666 & ~mask
    assert stat.S_IMODE(done.path.stat().st_mode) == 0o666 & ~mask


def test_permissions_of_a_replaced_file_stay(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    (tmp_path / "out").chmod(0o640)
    assert write_safetensors(tmp_path / "out", TENSORS, {}, force=True).mode == 0o640
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_a_dry_run_does_all_but_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    real = safetensors_bytes.require_same
    monkeypatch.setattr(safetensors_bytes, "require_same", lambda *a: (checked.append(a), real(*a))[1])
    dry = write_safetensors(tmp_path / "out", TENSORS, METADATA, force=False, dry_run=True)
    assert leftovers(tmp_path) == []
    assert len(checked) == 1
    assert write_safetensors(tmp_path / "out", TENSORS, METADATA, force=False).sha256 == dry.sha256


def fail_with(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("place", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_leaves_things_as_they_were(tmp_path: Path, monkeypatch, place: str, code: int) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "out").write_bytes(b"before")
    monkeypatch.setattr(write.os, place, fail_with(OSError(code, os.strerror(code))))
    refused(os.strerror(code), tmp_path / "out", TENSORS, {}, force=True)
    assert (tmp_path / "out").read_bytes() == b"before"
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), ZeroDivisionError()])
def test_any_exception_leaves_things_as_they_were(tmp_path: Path, monkeypatch, error: BaseException) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "out").write_bytes(b"before")
    monkeypatch.setattr(safetensors_bytes, "require_same", fail_with(error))
    with pytest.raises(type(error), match=str(error)):
        write_safetensors(tmp_path / "out", TENSORS, {}, force=True)
    assert (tmp_path / "out").read_bytes() == b"before"
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("group", [8, 16, 100, 1 << 20])
@pytest.mark.parametrize("tensors", [TENSORS, LARGER], ids=["all types", "larger"])
@pytest.mark.parametrize("place", [-1, -30, -200, -300, 3, 60])
def test_bytes_that_change_on_the_disk_are_found(tmp_path: Path, monkeypatch, place: int, tensors, group: int) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(safetensors_bytes, "_GROUP_BYTES", group)
    good = write_safetensors(tmp_path / "good", tensors, METADATA, force=False)
    assert good.path.stat().st_size == good.size_bytes == safetensors_bytes.size_of(tensors, METADATA, is_made=False)
    real = safetensors_bytes.require_same

    def damage(path: Path, written: Writing, *rest: Any) -> None:
        written.sha256()
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        real(path, written, *rest)

    monkeypatch.setattr(safetensors_bytes, "require_same", damage)
    refused("reads back differently|cannot be read back", tmp_path / "out", tensors, METADATA)
    assert leftovers(tmp_path) == ["good"]


def test_a_name_taken_in_the_meantime_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_bytes, "require_same", lambda *_: (tmp_path / "out").write_bytes(b"theirs"))
    refused("exists already", tmp_path / "out", TENSORS, {})
    assert (tmp_path / "out").read_bytes() == b"theirs"


def test_check_output_says_so_before_long_work(tmp_path: Path) -> None:
    assert check_output(tmp_path / "out", force=False) == Path(os.path.realpath(tmp_path / "out"))
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "out", force=False, source=tmp_path / "nothing")
    assert leftovers(tmp_path) == ["out"]


def heed_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, which children inherit; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier output", "new"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_kill_in_the_middle_leaves_no_partial_output(tmp_path: Path, number: signal.Signals, earlier: bool) -> None:
    script = """
        import sys, time, torch
        from repconv_cli.checkpoint import safetensors_bytes, write_safetensors
        real = safetensors_bytes.chunks
        def slowly(*arguments):
            for chunk in real(*arguments):
                yield chunk
                print("writing", flush=True)
                # Python looks for signals between two calls; one that comes just before a sleep does not shorten it.
                for _ in range(600):
                    time.sleep(0.1)
        safetensors_bytes.chunks = slowly
        write_safetensors(sys.argv[1], {"w": torch.ones(9)}, {}, force=True)
    """
    out = tmp_path / "out"
    if earlier:
        out.write_bytes(b"before")
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=heed_sigint) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        assert len(leftovers(tmp_path, "out")) == 1
        child.send_signal(number)
        code = child.wait(timeout=30)
    assert code != 0
    assert (out.read_bytes() if earlier else not out.exists()) == (b"before" if earlier else True)
    if number is not signal.SIGKILL:
        assert leftovers(tmp_path, "out") == []
    if number is signal.SIGTERM:
        assert code == 143
