"""Bad input and bad usage: exit 2, one message on stderr that helps, no traceback, and no file."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import Result

from repconv_cli.cli.main import app
from tests.cli.runs import ARCHITECTURES, FOLDER, INPUT, SAMPLES, run

assert app.pretty_exceptions_enable is False
REPVGG = SAMPLES["repvgg_digits.pt"].path
WEIGHTS = SAMPLES["repvgg_plain_digits_state.pt"].path


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., Result]:
    """Fuse what must be refused; check what holds of every refusal."""

    def check(*arguments: object, reason: str = "") -> Result:
        out = tmp_path / "out" / "model.safetensors"
        out.parent.mkdir()
        done = run("fuse", arguments[0], out, *arguments[1:])
        assert done.exit_code == 2, done.output
        assert done.stdout == ""
        assert "Traceback" not in done.output
        assert reason in done.stderr
        assert list(out.parent.iterdir()) == [], "something was written"
        return done

    return check


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def checkpoint(path: Path, content: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, 2))
        archive.writestr("archive/version", "3\n")
    return path


def test_a_missing_file_gets_did_you_mean(refused: Callable[..., Result]) -> None:
    message = refused(FOLDER / "repvgg_digit.pt", reason="there is no such file").stderr
    assert "Did you mean repvgg_digits.pt" in message


def test_a_name_like_nothing_gets_no_suggestion(refused: Callable[..., Result], tmp_path: Path) -> None:
    assert "Did you mean" not in refused(tmp_path / "nothing.pt", reason="no such file").stderr


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ("1,3,8,8", "--input"),
        ("1,1,8", "--input"),
        ("a,b", "needed: positive numbers with commas, such as 1,3,224,224"),
        ("1,1,0,8", "needed: positive numbers with commas"),
        ("", "needed: positive numbers with commas"),
    ],
)
def test_a_wrong_input_shape(refused: Callable[..., Result], small: Path, shape: str, reason: str) -> None:
    refused(small, "--input", shape, reason=reason)


def test_two_shapes_for_one_input(refused: Callable[..., Result], small: Path) -> None:
    refused(small, "--input", "1,1,8,8", "--input", "1,1,8,8", reason="--input")


def test_a_shape_that_a_program_does_not_take(refused: Callable[..., Result]) -> None:
    refused(SAMPLES["repvgg_digits.pt2"].path, "--input", "1,1,9,9", reason="needed: sizes free,1,8,8")


def test_an_unknown_option(refused: Callable[..., Result]) -> None:
    refused(REPVGG, "--nope", reason="--nope")


@pytest.mark.parametrize("arguments", [(), ("melt",), ("inspect",), ("fuse", REPVGG), ("inspect", REPVGG, "--seed", 1)])
def test_wrong_usage(arguments: tuple[object, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_foreign_class_is_named_and_not_run(refused: Callable[..., Result], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = checkpoint(tmp_path / "evil.pt", {"weight": Calls(os.mkdir, str(marker))})
    message = refused(path).stderr
    assert "mkdir" in message
    assert not marker.exists()


def test_a_call_of_an_admitted_class_is_refused(refused: Callable[..., Result], tmp_path: Path) -> None:
    assert "Linear" in refused(checkpoint(tmp_path / "linear.pt", Calls(nn.Linear, 20000, 20000))).stderr


def test_a_pickled_weight_in_a_program_is_refused(refused: Callable[..., Result], tmp_path: Path) -> None:
    changed = []
    with (
        zipfile.ZipFile(SAMPLES["grouped_digits.pt2"].path) as source,
        zipfile.ZipFile(tmp_path / "evil.pt2", "w") as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".json") and b'"use_pickle"' in content:
                config = json.loads(content)
                key = next(iter(config["config"]))
                config["config"][key]["use_pickle"] = True
                content = json.dumps(config).encode()
                changed.append(key)
            target.writestr(name, content)
    assert changed
    assert changed[0] in refused(tmp_path / "evil.pt2", reason="pickled").stderr


def test_nan_in_a_module(refused: Callable[..., Result], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    torch.save(model, tmp_path / "nan.pt")
    refused(tmp_path / "nan.pt", reason="tensor 0.weight holds 1 values of 36 that are NaN or infinite")


@pytest.mark.parametrize("file", ["repvgg_digits.pt", "grouped_digits.pt2", "repvgg_plain_digits_state.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file(refused: Callable[..., Result], tmp_path: Path, file: str, share: float) -> None:
    content = SAMPLES[file].path.read_bytes()
    (tmp_path / file).write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / file, reason=file)


def test_weights_without_an_architecture(refused: Callable[..., Result]) -> None:
    refused(WEIGHTS, reason="Give it with --arch file.py:callable")


def test_weights_of_another_architecture(refused: Callable[..., Result]) -> None:
    arch = f"{ARCHITECTURES}:mobileone_digits"
    message = refused(WEIGHTS, "--arch", arch, reason="the weights do not belong to this architecture").stderr
    assert "166 missing (stem.convs.0.conv.weight" in message
    assert "22 unexpected (0.convs.0.weight" in message


def test_weights_of_other_shapes(refused: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(1, 4, 3))\n")
    torch.save(nn.Sequential(nn.Conv2d(1, 8, 3)).state_dict(), tmp_path / "wide.pt")
    message = refused(tmp_path / "wide.pt", "--arch", f"{tmp_path / 'arch.py'}:make").stderr
    assert "0.weight has shape (8, 1, 3, 3)" in message
    assert "needed: (4, 1, 3, 3)" in message


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("nothing", "file.py:callable"),
        ("none.py:make", "no such file"),
        (f"{ARCHITECTURES}:repvgg_digit", "did you mean repvgg_digits?"),
        (f"{ARCHITECTURES}:nn", "has no callable"),
        (f"{ARCHITECTURES}:annotations", "has no callable"),
    ],
)
def test_an_architecture_that_is_not_there(refused: Callable[..., Result], arch: str, reason: str) -> None:
    refused(WEIGHTS, "--arch", arch, reason=reason)


def test_an_architecture_for_a_whole_module(refused: Callable[..., Result]) -> None:
    refused(REPVGG, "--arch", f"{ARCHITECTURES}:repvgg_digits", reason="--arch is not needed")


def test_blocks_that_match_nothing_are_not_called_fused_already(small: Path) -> None:
    done = run("inspect", small, *INPUT, "--blocks", "none.*")
    assert "every linear unit is a single operator already" not in done.output
    assert "none.*" in done.output


def test_a_refusal_as_json_is_one_document_with_the_same_code(tmp_path: Path) -> None:
    done = run("fuse", tmp_path / "nothing.pt", tmp_path / "out.safetensors", "--json")
    assert done.exit_code == 2
    assert done.stdout.count("\n") == 1
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["where"].endswith("nothing.pt")
    assert "no such file" in error["found"]


def test_a_bug_of_ours_exits_70_without_a_traceback(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("repconv_cli.convert.inspect", fail)
    done = run("inspect", small)
    assert (done.exit_code, done.stdout) == (70, "")
    assert "internal error: ZeroDivisionError: of ours" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("inspect", small, "--debug").stderr
