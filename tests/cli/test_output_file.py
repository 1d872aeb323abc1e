"""OUT: written whole or not at all; an earlier one is overwritten only with --force, and the input never."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repconv_cli.convert import load
from tests.cli.runs import INPUT, child_environment, run, run_process

EARLIER = b"an earlier output"


def test_an_existing_output_stays_without_force(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(EARLIER)
    done = run("fuse", small, out, *INPUT)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "it exists already (17 B, just made); nothing was written. --force overwrites it." in done.stderr
    assert out.read_bytes() == EARLIER
    assert run("fuse", small, out, *INPUT, "--force").exit_code == 0
    assert list(load(out).state_dict()) == ["0.bias", "0.weight"]


@pytest.mark.parametrize("name", ["small.pt", "./small.pt", "link.pt"])
def test_the_input_is_never_the_output(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.pt").symlink_to(small)
    before = small.read_bytes()
    done = run("fuse", small, f"{tmp_path}/{name}", *INPUT, "--force")
    assert done.exit_code == 2
    assert "the output is the input" in done.stderr
    assert small.read_bytes() == before


def test_an_output_without_a_folder(small: Path, tmp_path: Path) -> None:
    done = run("fuse", small, tmp_path / "none" / "out.safetensors", *INPUT)
    assert done.exit_code == 2
    assert f"there is no folder {tmp_path / 'none'}. Make it first." in done.stderr


@pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.ckpt", "out.bin"])
def test_an_output_that_others_would_open_as_a_pickle_is_refused(small: Path, tmp_path: Path, name: str) -> None:
    done = run("fuse", small, tmp_path / name, *INPUT)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "is opened as a pickle, and fuse writes none; needed: a name that ends in .safetensors" in done.stderr
    assert not (tmp_path / name).exists()


def test_a_dry_run_reports_and_writes_nothing(small: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.safetensors"
    done = run("fuse", small, out, *INPUT, "--dry-run")
    assert done.exit_code == 0
    assert f"Would write {out}" in " ".join(done.stdout.split())
    assert sorted(tmp_path.iterdir()) == before
    told = json.loads(run("fuse", small, out, *INPUT, "--dry-run", "--json").stdout)["output"]
    assert told["is_dry_run"] is True
    run("fuse", small, out, *INPUT)
    assert out.stat().st_size == told["size_bytes"]


def test_strict_writes_nothing_where_something_was_refused(partly_refused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(EARLIER)
    done = run("fuse", partly_refused, out, *INPUT, "--strict", "--force")
    assert done.exit_code == 1
    assert "Left as they are (1)" in done.stdout
    assert "times the work" in done.stdout
    assert out.read_bytes() == EARLIER
    assert run("inspect", partly_refused, *INPUT, "--strict").exit_code == 1
    assert run("fuse", partly_refused, out, *INPUT, "--force").exit_code == 0
    assert out.read_bytes() != EARLIER


def test_a_report_of_an_output_that_was_not_written_says_so(partly_refused: Path, tmp_path: Path) -> None:
    done = run("fuse", partly_refused, tmp_path / "out.safetensors", *INPUT, "--strict")
    assert "nothing was written" in done.output.lower()


def test_outputs_that_differ_are_not_written(small: Path, tmp_path: Path) -> None:
    done = run("fuse", small, tmp_path / "out.safetensors", *INPUT, "--rtol", "0", "--atol", "0", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["verification"]["passed"] is False
    assert json.loads(done.stdout)["output"] is None
    assert not (tmp_path / "out.safetensors").exists()


def test_an_output_that_is_no_file_is_refused_at_once(small: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "none" / "out.safetensors")
    before = sorted(tmp_path.iterdir())
    reasons = {
        tmp_path / "pipe": "it is a pipe, socket or device",
        tmp_path / "folder": "it is a folder",
        tmp_path / "nowhere": f"there is no folder {tmp_path / 'none'}. Make it first.",
        tmp_path / "small.pt" / "out.safetensors": "Not a directory",
        tmp_path / ("n" * 300): "it cannot be written (File name too long)",
        Path("/dev/null"): "it is a pipe, socket or device",
    }
    for out, reason in reasons.items():
        done = run("fuse", small, out, *INPUT, "--force")
        assert (done.exit_code, done.stdout) == (2, "")
        assert reason in done.stderr or "is not a folder" in done.stderr
        assert "Reading" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_told_at_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    # An administrator may write there all the same, so the answer is given.
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path).name != "locked")
    done = run("fuse", small, tmp_path / "locked" / "out.safetensors", *INPUT)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "locked cannot be written" in done.stderr
    assert "Reading" not in done.stderr


@pytest.mark.parametrize("command", ["inspect", "fuse", "verify"])
def test_a_file_that_may_not_be_read_is_told_in_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    locked = tmp_path / "\x1b[31mlocked.pt"
    small.rename(locked)
    access, opened = os.access, os.open

    def refuse(path: str, *rest: int, **options: int) -> int:
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *rest, **options)

    # An administrator may read it all the same, so the answers are given.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))
    monkeypatch.setattr(os, "open", refuse)
    done = run(command, locked, *([] if command == "inspect" else [tmp_path / "out"]))
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "…" not in line]
    assert line.startswith("error: ")
    assert line.endswith("the file cannot be read (Permission denied)")
    assert "\x1b" not in line


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier output", "new"])
def test_a_write_that_fails_leaves_what_was_there(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, earlier: bool
) -> None:
    out = tmp_path / "out.safetensors"
    if earlier:
        out.write_bytes(EARLIER)
    before = sorted(tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("repconv_cli.checkpoint.writing.Writing.write", fail)
    done = run("fuse", small, out, *INPUT, "--force")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"error: {out}: it cannot be written ({os.strerror(code)})"
    assert sorted(tmp_path.iterdir()) == before
    assert not earlier or out.read_bytes() == EARLIER


# The command, which dies just before its last rename.
KILLED = """
import os, signal
os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
from repconv_cli.cli.main import run
run()
"""


def test_a_kill_while_writing_leaves_the_earlier_output(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(EARLIER)
    done = run_process("-c", KILLED, "fuse", small, out, *INPUT, "--force")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "Writing" in done.stderr
    assert out.read_bytes() == EARLIER
    # All that is left beside it is hidden, and under another name.
    assert {path.name[0] for path in tmp_path.iterdir() if path not in (out, small)} == {"."}


def heed_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, which children inherit; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_exits_130_and_leaves_no_output(tmp_path: Path) -> None:
    started, out = tmp_path / "started", tmp_path / "out.safetensors"
    # Python looks for signals between two calls; one that comes just before a sleep does not shorten it.
    (tmp_path / "arch.py").write_text(
        "import pathlib, time\n"
        f"def make():\n    pathlib.Path({str(started)!r}).touch()\n    for _ in range(600):\n        time.sleep(0.1)\n"
    )
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    command = ["fuse", tmp_path / "weights.pt", out, "--arch", f"{tmp_path / 'arch.py'}:make"]
    child = subprocess.Popen(
        [sys.executable, "-m", "repconv_cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
        preexec_fn=heed_sigint,
    )
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert started.exists()
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert stdout == ""
    assert "interrupted; nothing was written" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
