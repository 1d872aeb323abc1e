"""What goes to which stream, and that nothing in it can steer a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from repconv_cli import convert
from repconv_cli.cli.boundary import run_command
from repconv_cli.cli.options import Showing
from repconv_cli.cli.progress import Progress
from repconv_cli.options import Options
from repconv_cli.results import Verification
from tests.cli.runs import INPUT, SAMPLES, child_environment, run, run_process

ESCAPE = "\x1b"


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("fuse", "--help"), ("inspect", "x", "--nope")])
def test_help_and_version_import_no_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nsys.argv[0] = 'repconv'\nfrom repconv_cli.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as leaving:\n"
        "    print('code', leaving.code, 'torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    done = run_process("-c", code, *arguments)
    expected = 2 if "--nope" in arguments else 0
    assert done.stderr.splitlines()[-1] == f"code {expected} False False"
    if arguments == ("--version",):
        assert done.stdout.startswith("repconv 0.")
    elif not expected:
        assert "Usage: repconv" in done.stdout


def test_help_tells_the_exit_codes_and_every_command() -> None:
    told = " ".join(run("--help").stdout.split())
    for text in (
        "0 done and verified",
        "1 outputs differ",
        "2 bad input",
        "70 a bug",
        "130 interrupted",
        "inspect",
        "fuse",
        "verify",
    ):
        assert text in told


def test_piped_output_is_plain_text_with_whole_names(tmp_path: Path) -> None:
    # A path of 159 characters: wider than a terminal, and more than its column in a page of 200.
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    for level in range(5):
        holder = nn.Sequential()
        holder.add_module(f"a_rather_long_name_for_level_{level}", model)
        model = holder
    torch.save(model, tmp_path / "deep.pt")
    path = ".".join(f"a_rather_long_name_for_level_{level}" for level in reversed(range(5)))
    done = run_process(
        "-m", "repconv_cli", "inspect", tmp_path / "deep.pt", *INPUT, COLUMNS="40", TERM="xterm-256color"
    )
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout + done.stderr
    assert f"{path}.0" in done.stdout
    assert "Reading …" in done.stderr
    assert "Reading" not in done.stdout


class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self) -> bool:
        return True


PASSED = Verification("pass", True, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, None, 0.0)


def test_no_color_is_honoured(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = convert.inspect(small, Options(input=((1, 1, 8, 8),)))
    result = replace(result, verification=PASSED)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    shown = []
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            with pytest.raises(typer.Exit, match="0"):
                run_command(lambda _: result, Showing())
        shown.append(terminal.getvalue())
    coloured, plain = shown
    colour = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7])m")
    assert colour.search(coloured)
    assert "PASS" in plain
    assert not colour.search(plain)


def test_quiet_prints_nothing_but_errors(small: Path, tmp_path: Path) -> None:
    done = run("fuse", small, tmp_path / "out.safetensors", *INPUT, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    failed = run("inspect", tmp_path / "none.pt", "--quiet")
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert "no such file" in failed.stderr


def test_json_is_printed_even_when_quiet(small: Path) -> None:
    done = run("inspect", small, *INPUT, "--json", "--quiet")
    assert json.loads(done.stdout)["command"] == "inspect"
    assert done.stderr == ""


def test_what_a_model_prints_is_no_part_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text(
        "import torch\n\nclass Talks(torch.nn.Conv2d):\n    def forward(self, x):\n        print('called')\n"
        "        return super().forward(x)\n\ndef make():\n    print('made')\n    return Talks(3, 4, 1)\n"
    )
    torch.save(nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "weights.pt")
    arch = f"{tmp_path / 'arch.py'}:make"
    done = run("inspect", tmp_path / "weights.pt", "--arch", arch, "--input", "1,3,8,8", "--json", "--quiet")
    assert json.loads(done.stdout)["totals"]["convs"]["before"] == 1
    assert "made" in done.stderr
    assert "called" in done.stderr


def test_all_lists_each_block_on_its_own(monkeypatch: pytest.MonkeyPatch, trace_once: Callable[..., Any]) -> None:
    monkeypatch.setattr(convert, "trace_source", trace_once)
    sample = SAMPLES["repvgg_plain_digits.pt"]
    folded, listed = run("inspect", *sample.arguments), run("inspect", *sample.arguments, "--all")
    rows = [line for line in listed.stdout.splitlines() if "3×3 + 1×1" in line]
    assert len(rows) == sample.blocks > len([line for line in folded.stdout.splitlines() if "3×3 + 1×1" in line])


HOSTILE_NAMES = ["[red]x[/red]", "[link=http://evil]x", "a\u202eb", "a b"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_markup_in_a_modules_name_is_shown_as_text(tmp_path: Path, name: str) -> None:
    block = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    model = nn.Sequential().eval()
    model.add_module(name, block)
    torch.save(model, tmp_path / "named.pt")
    done = run("inspect", tmp_path / "named.pt", *INPUT, "--all")
    assert done.exit_code in (0, 2), done.output
    assert "\u202e" not in done.output
    assert "Traceback" not in done.output
    if done.exit_code == 0 and name.isprintable():
        assert name in done.stdout


@pytest.mark.parametrize("key", ["\x1b[31mred.weight", "\x1b]0;title\x07.weight", "a\nb.weight", "[red]x[/red].weight"])
def test_a_key_with_escapes_is_shown_without_them(tmp_path: Path, key: str) -> None:
    torch.save({key: torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "arch.py").write_text("from torch import nn\ndef make(): return nn.Linear(1, 2)\n")
    for arguments in ((), ("--arch", f"{tmp_path / 'arch.py'}:make")):
        done = run("inspect", tmp_path / "weights.pt", *arguments)
        # Without an architecture, what the file holds is listed.
        assert done.exit_code == (2 if arguments else 0)
        assert not set(done.output) & set("\x1b\x07")
        assert "a\nb" not in done.output
        if "[red]" in key:
            assert "[red]x[/red].weight" in done.output


def test_a_file_name_with_escapes_is_shown_without_them(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "\x1b[31mred[bold].pt")
    assert done.exit_code == 2
    assert ESCAPE not in done.output
    assert "[bold].pt" in done.stderr


def test_the_first_line_comes_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    code = (
        "import io, sys\nfrom repconv_cli.cli.start import run\n"
        "class Sign(io.TextIOWrapper):\n"
        "    def write(self, text):\n"
        "        print(repr(text), [m for m in ('torch', 'numpy', 'rich', 'typer', 'msgspec') if m in sys.modules])\n"
        "        raise SystemExit\n"
        "sys.stderr = Sign(io.BytesIO())\nrun()"
    )
    for arguments in (("inspect", "a"), ("fuse", "a", "b"), ("verify", "a", "b"), ("bench", "a")):
        done = run_process("-c", code, *arguments, "--html", tmp_path / "report.html")
        assert done.stdout == "'Starting …\\n' []\n", done.stderr


def test_the_first_line_is_said_once_and_not_beside_help_or_where_quiet_is_asked_for() -> None:
    missing = ("-m", "repconv_cli", "inspect", "missing.pt")
    assert run_process(*missing).stderr.splitlines()[0] == "Starting …"
    assert run_process(*missing).stderr.count("Starting") == 1
    for silent in ((*missing, "--quiet"), (*missing, "-q"), ("-m", "repconv_cli", "inspect", "--help")):
        assert "Starting" not in run_process(*silent).stderr


def test_a_log_is_never_silent_for_long(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=False) as progress:
        progress("Tracing", 0, 0)
        time.sleep(2.2)
        progress("Proving stem", 3, 22)
        time.sleep(1.2)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Tracing …"
    assert sum(re.fullmatch(r"Tracing … \d s", line) is not None for line in lines) >= 1
    assert any(re.fullmatch(r"Proving … 3 of 22, \d s", line) for line in lines)


def test_threads_of_a_command_wait_without_spinning_but_those_that_are_timed() -> None:
    told = "import os, sys\nfrom repconv_cli.cli.main import run\ntry:\n    run()\nfinally:\n    "
    told += "print('policy', os.environ.get('OMP_WAIT_POLICY'))"
    environment = {key: value for key, value in child_environment().items() if key != "OMP_WAIT_POLICY"}
    for command, policy in (("fuse", "PASSIVE"), ("bench", "None")):
        done = subprocess.run(
            [sys.executable, "-c", told, command, "--help"], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.splitlines()[-1] == f"policy {policy}"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_report_that_finds_no_room_is_an_error_of_its_own(options: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "repconv_cli", "inspect", SAMPLES["repvgg_digits.pt"].path, *INPUT, *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the report cannot be written to stdout (No space left on device)"


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_whoever_closes_the_pipe_ends_nothing(options: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "repconv_cli", "inspect", SAMPLES["repvgg_digits.pt"].path, *INPUT, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        said = child.stderr.read().decode()
    assert child.returncode == 0
    assert "error" not in said.lower()


@pytest.mark.parametrize(
    "arguments",
    [
        ("fuse", "s.pt"),
        ("fuse", "s.pt", "o.safetensors", "--bogus"),
        ("inspect", "s.pt", "--samples", "0"),
        ("nothing",),
    ],
)
def test_wrong_usage_is_one_document_too(arguments: tuple[str, ...]) -> None:
    done = run_process("-m", "repconv_cli", *arguments, "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["found"]
    assert error["found"] in " ".join(done.stderr.split())


@pytest.mark.parametrize(("code", "told"), [("3", "sys.exit(3)"), ("", "sys.exit()"), ("'no GPU'", "sys.exit(no GPU)")])
def test_a_model_that_ends_the_program_is_told(code: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text(f"import sys\ndef make():\n    sys.exit({code})\n")
    torch.save({"weight": torch.ones(2)}, tmp_path / "w.pt")
    arch = f"{tmp_path / 'arch.py'}:make"
    done = run_process("-m", "repconv_cli", "inspect", tmp_path / "w.pt", "--arch", arch, "--json")
    assert done.returncode == 2
    assert told in json.loads(done.stdout)["error"]["found"]
    assert told in done.stderr.splitlines()[-1]
