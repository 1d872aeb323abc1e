"""The same promises under real limits: address space, file size, and a kill at any moment."""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.checkpoint.hostile_files import Calls, Stored, checkpoint, pickled, tensor_claim
from tests.cli.runs import run, run_process
from tests.hostile.case import make_net

EARLIER = b"an earlier output"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the limit, or the way to measure it, is Linux's")

# The command on one harmless file, then on the others, with the address space limited to what the first one took.
LIMITED = """
import resource, sys
from pathlib import Path
from repconv_cli.cli.main import app
def fuse(path):
    try:
        app(["fuse", path, "--input", "2,1,8,8", path + ".safetensors"])
    except SystemExit as leaving:
        return leaving.code
codes = [fuse(sys.argv[1])]
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (300 << 20),) * 2)
codes += [fuse(path) for path in sys.argv[2:]]
print("codes", codes)
"""


@LINUX
def test_hostile_files_are_refused_where_there_is_no_memory_for_them(tmp_path: Path) -> None:
    torch.save(make_net(), tmp_path / "good.pt")
    bombs = {
        "bytearray.pt": pickle.dumps(Calls(bytearray, 3 << 30), 2),
        "linear.pt": pickle.dumps(Calls(nn.Linear, 30000, 30000), 2),
        "memo.pt": b"\x80\x02}r\xff\xff\xff\x3f.",
        "giant.pt": pickled({"w": tensor_claim(Stored("0", 1), 0, (1 << 33,), (0,))}),
        "claim.pt": pickled({"w": tensor_claim(Stored("0", 1 << 30), 0, (1 << 30,), (1,))}),
    }
    for name, data in bombs.items():
        checkpoint(tmp_path / name, data, {"0": b"abcd"})
    pad = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ConstantPad2d(30_000, 0.0)).eval()
    torch.save(pad, tmp_path / "pad.pt")
    paths = [tmp_path / name for name in ("good.pt", *bombs, "pad.pt")]
    done = run_process("-c", LIMITED, *paths)
    assert done.stdout.splitlines()[-1] == f"codes {[0] + [2] * (len(bombs) + 1)}", done.stderr
    assert done.stderr.count("error: ") == len(bombs) + 1
    assert "Traceback" not in done.stderr


# The command, which may not write a file of more than a kilobyte: as on a disk that fills up.
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
from repconv_cli.cli.main import run
run()
"""


@LINUX
@pytest.mark.parametrize("earlier", [True, False], ids=["over an earlier output", "new"])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, earlier: bool) -> None:
    torch.save(make_net(), tmp_path / "net.pt")
    out = tmp_path / "out.safetensors"
    if earlier:
        out.write_bytes(EARLIER)
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run_process("-c", FULL, "fuse", tmp_path / "net.pt", out, "--input", "2,1,8,8", "--force")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {out}: it cannot be written (File too large)")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not earlier or out.read_bytes() == EARLIER


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked, so that each starts warm")
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "net.pt", tmp_path / "out.safetensors"
    torch.save(make_net(), source)
    start = time.perf_counter()
    assert run("fuse", source, out, "--input", "2,1,8,8").exit_code == 0
    start = time.perf_counter()
    assert run("fuse", source, out, "--input", "2,1,8,8", "--force").exit_code == 0
    seconds, whole = time.perf_counter() - start, out.read_bytes()
    draw, found = random.Random(0), set()
    for turn in range(30):
        out.write_bytes(EARLIER)
        child = os.fork()
        if child == 0:
            run("fuse", source, out, "--input", "2,1,8,8", "--force")
            os._exit(0)
        time.sleep(draw.uniform(0, 1.3 * seconds))
        os.kill(child, signal.SIGTERM if turn % 2 else signal.SIGKILL)
        os.waitpid(child, 0)
        found.add(out.read_bytes())
        strangers = [path.name for path in tmp_path.iterdir() if path not in (source, out)]
        assert all(name.startswith(".out.safetensors.") for name in strangers)
        for name in strangers:
            (tmp_path / name).unlink()
    assert found <= {EARLIER, whole}
    assert EARLIER in found
