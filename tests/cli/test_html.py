"""--html: one file, written whole, that replaces nothing it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runs import INPUT, run


def test_inspect_fuse_and_verify_write_a_page(small: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.safetensors", tmp_path / "report.html"
    for arguments in (("inspect", small), ("fuse", small, out), ("verify", small, out)):
        done = run(*arguments, *INPUT, "--html", page, "--force")
        assert done.exit_code == 0, done.output
        assert f"Report    {page}" in done.stdout
        text = page.read_text()
        assert text.startswith("<!doctype html>")
        data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
        assert [block["name"] for block in data["blocks"]] == ["0"]
        assert len(data["blocks"][0]["picture"]["branches"]) == 1
        assert [len(data["graphs"][side]["nodes"]) for side in ("before", "after")] == [5, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "report.html", "small.pt"]


@pytest.mark.parametrize("command", ["inspect", "fuse", "verify"])
def test_an_earlier_page_stays_without_force_and_nothing_is_done(small: Path, tmp_path: Path, command: str) -> None:
    page, out = tmp_path / "report.html", tmp_path / "out.safetensors"
    page.write_text("earlier")
    done = run(command, small, *([] if command == "inspect" else [out]), *INPUT, "--html", page)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "it exists already (7 B, just made); nothing was written. --force overwrites it." in done.stderr
    assert page.read_text() == "earlier"
    assert not out.exists()


@pytest.mark.parametrize("name", ["small.pt", "./small.pt", "link.pt", "out.safetensors"])
def test_the_page_is_never_the_input_nor_out(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link.pt").symlink_to(small)
    before = small.read_bytes()
    done = run(
        "fuse", small, tmp_path / "out.safetensors", *INPUT, "--html", f"{tmp_path}/{name}", "--force"
    )  # fmt: skip
    assert done.exit_code == 2
    assert "--html names a file that the command reads or writes" in done.stderr
    assert small.read_bytes() == before
    assert not (tmp_path / "out.safetensors").exists()


def test_a_page_is_written_of_what_failed_too(small: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run(
        "fuse", small, tmp_path / "out.safetensors", *INPUT, "--rtol", "0", "--atol", "0", "--html", page
    )  # fmt: skip
    assert done.exit_code == 1
    assert "<strong>FAIL</strong>" in page.read_text()


def test_a_page_and_json_go_together(small: Path, tmp_path: Path) -> None:
    done = run("inspect", small, *INPUT, "--json", "--html", tmp_path / "report.html")
    assert "drawing" not in json.loads(done.stdout)
    assert (tmp_path / "report.html").exists()
