"""Weights alone are proven while they are written: whatever happens in the middle, the output is whole or not there."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from repconv_cli.errors import UnprovenError
from repconv_cli.folding import Folder
from tests.cli.runs import run, run_process

EARLIER = b"an earlier output"

# The command, whose second block meets what SECOND says.
IN_THE_MIDDLE = """
import os, resource, signal, sys
from repconv_cli.folding import Folder
fold, calls = Folder.fold, []
def second(self, block, *more):
    calls.append(block)
    if len(calls) == 2:
        {second}
    return fold(self, block, *more)
Folder.fold = second
from repconv_cli.cli.main import run
run()
"""


def branches(channels: int = 16) -> dict[str, torch.Tensor]:
    """Return three blocks of the RepVGG repository, without a graph."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for block in range(3):
        for branch, size in (("rbr_dense", 3), ("rbr_1x1", 1)):
            path = f"stage1.{block}.{branch}"
            found[f"{path}.conv.weight"] = torch.randn(channels, channels, size, size, generator=generator)
            for name in ("weight", "bias", "running_mean", "running_var"):
                found[f"{path}.bn.{name}"] = torch.rand(channels, generator=generator) + 0.1
    return found


@pytest.fixture
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(branches(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out.safetensors"
    path.write_bytes(EARLIER)
    return path


def in_the_middle(second: str, weights: Path, out: Path) -> tuple[int, str]:
    done = run_process("-c", IN_THE_MIDDLE.format(second=second), "fuse", weights, out, "--force")
    return done.returncode, done.stderr


def test_without_a_mishap_it_is_written(weights: Path, out: Path) -> None:
    code, told = in_the_middle("pass", weights, out)
    assert code == 0, told
    assert out.read_bytes() != EARLIER


def test_a_block_that_fails_its_proof_in_the_middle(weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[object] = []
    fold = Folder.fold

    def second_fails(self: Folder, block: object, *more: object) -> object:
        proven.append(block)
        if len(proven) == 2:
            raise UnprovenError("one operator differs from its branches")
        return fold(self, block, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Folder, "fold", second_fails)
    done = run("fuse", weights, out, "--force")
    assert done.exit_code == UnprovenError.exit_code
    assert len(proven) == 2
    assert [path.read_bytes() for path in out.parent.iterdir()] == [EARLIER]


def test_a_disk_that_is_full_in_the_middle(weights: Path, out: Path) -> None:
    # The system itself refuses more: the first block still fits.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))"
    code, told = in_the_middle(limit, weights, out)
    assert code == 2, told
    assert told.splitlines()[-1] == f"error: {out}: it cannot be written (File too large)"
    assert [path.read_bytes() for path in out.parent.iterdir()] == [EARLIER]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_it_is_told_to_end_in_the_middle(name: str, code: int, weights: Path, out: Path) -> None:
    # Where this runs in the background, SIGINT is ignored from the start.
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler); "
    found, told = in_the_middle(f"{heed}os.kill(os.getpid(), signal.{name})", weights, out)
    assert found == code, told
    assert "Traceback" not in told
    assert [path.read_bytes() for path in out.parent.iterdir()] == [EARLIER]


def test_it_is_killed_in_the_middle(weights: Path, out: Path) -> None:
    code, told = in_the_middle("os.kill(os.getpid(), signal.SIGKILL)", weights, out)
    assert code == -signal.SIGKILL, told
    assert out.read_bytes() == EARLIER
    left = [path for path in out.parent.iterdir() if path != out]
    assert all(path.name.startswith(".") and path.name.endswith(".part") for path in left)
    # The next run is not hindered by what was left.
    assert run("fuse", weights, out, "--force").exit_code == 0


def test_an_output_that_is_the_input_a_folder_a_link_or_a_pipe(weights: Path) -> None:
    tmp_path, before = weights.parent, weights.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(weights)
    os.link(weights, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    for name in ("weights.pt", "folder", "link", "hard", "pipe"):
        done = run("fuse", weights, tmp_path / name, "--force")
        assert (done.exit_code, done.stdout) == (2, ""), name
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert weights.read_bytes() == before
    # A link to another file is followed, and stays a link.
    (tmp_path / "elsewhere").write_bytes(EARLIER)
    (tmp_path / "alias").symlink_to(tmp_path / "elsewhere")
    done = run("fuse", weights, tmp_path / "alias", "--force", "--json")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "alias").is_symlink()
    size = json.loads(done.stdout)["output"]["size_bytes"]
    assert (tmp_path / "elsewhere").stat().st_size == size
