"""OUT: written whole or not at all; an earlier one is overwritten only with --force, and the input never."""

from __future__ import annotations

import json
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
    assert "it exists already. --force overwrites it." in done.stderr
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
    assert "out.safetensors" in done.stderr


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
    (tmp_path / "arch.py").write_text(
        f"import pathlib, time\ndef make():\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(60)\n"
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
