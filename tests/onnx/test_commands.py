"""The commands on ONNX files: what the terminal, the JSON and the page tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import repconv_cli
from repconv_cli.options import Options
from tests.cli.runs import run
from tests.onnx.blocks import repvgg
from tests.onnx.graphs import save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(repvgg(), tmp_path)


def test_inspect_tells_the_blocks_of_a_file(model: Path) -> None:
    done = run("inspect", model, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [block["kind"] for block in told["blocks"]] == ["3×3 + 1×1 + identity"]
    assert told["seconds"].keys() == {"Reading", "Analysing"}


def test_the_page_draws_blocks_and_graphs(model: Path, tmp_path: Path) -> None:
    for arguments in (
        ("inspect", model),
        ("fuse", model, tmp_path / "out.onnx"),
        ("verify", model, tmp_path / "out.onnx"),
    ):
        page = tmp_path / f"{arguments[0]}.html"
        done = run(*arguments, "--html", page)
        assert done.exit_code == 0, done.output
        assert '"taps":[3,3]' in page.read_text()


def test_a_drawing_has_the_operators_of_the_file(model: Path) -> None:
    result = repconv_cli.convert.inspect(model, Options(draw=True))
    assert result.drawing is not None
    picture = result.drawing.pictures[0]
    assert [kernel.label for kernel in picture.branches] == ["3×3", "1×1", "identity"]
    assert picture.fused is not None
    sums = [sum(kernel.slices[0][tap] for kernel in picture.branches) for tap in range(9)]
    assert sums == pytest.approx(picture.fused.slices[0], rel=1e-3, abs=1e-4)


def test_each_compared_sample_is_counted(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    repconv_cli.convert.fuse(model, tmp_path / "out.onnx", Options(samples=3), progress=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "Comparing outputs"] == [("Comparing outputs", i, 3) for i in range(3)]


def test_another_kind_of_file_is_not_called_damaged(model: Path, tmp_path: Path) -> None:
    # Any output that holds a graph can be judged by an ONNX source; weights hold none.
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "out.pt")
    done = run("verify", model, tmp_path / "out.pt")
    assert done.exit_code == 2
    assert "out.pt: it holds no graph, so its outputs cannot be computed; needed: a file that fuse wrote" in done.stderr
    (tmp_path / "out.txt").write_text("no protobuf")
    done = run("verify", model, tmp_path / "out.txt")
    assert done.exit_code == 2
    assert "damaged" not in done.stderr
