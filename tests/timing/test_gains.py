"""``repconv bench`` end to end: what it compares, what it says, what it refuses. No time is asserted."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console
from torch import nn

import repconv_cli
from repconv_cli import gains
from repconv_cli.errors import InputError
from repconv_cli.options import Options, Timing
from repconv_cli.report.bench import bench_screen
from repconv_cli.report.plot import speed_plot
from repconv_cli.results import BenchFacts, RuntimeFacts
from repconv_cli.timing import runtimes
from tests.cli.runs import run

QUICK = Timing(("eager",), seconds=0.1)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def test_a_source_is_fused_in_memory_and_timed_one_sample_at_a_time():
    result = gains.bench(small(), None, Options(input=((2, 3, 8, 8),)), QUICK)
    assert result.bench is not None
    assert result.bench.shapes == ((1, 3, 8, 8),)
    (eager,) = result.bench.runtimes
    assert eager.problem is None
    assert eager.original_ms > 0 < eager.fused_ms
    assert eager.original_spread_ms >= 0 <= eager.fused_spread_ms
    assert eager.speedup_low <= eager.speedup <= eager.speedup_high
    assert result.verification is not None
    assert result.totals.norms.after == 0


def test_a_file_is_timed_at_the_batch_that_is_asked_for(tmp_path: Path) -> None:
    repconv_cli.fuse(small(), tmp_path / "out.safetensors", input=(2, 3, 8, 8))
    result = repconv_cli.bench(
        small(), tmp_path / "out.safetensors", input=(2, 3, 8, 8), timing=replace(QUICK, batch=5)
    )
    assert result.bench.shapes == ((5, 3, 8, 8),)
    assert result.output.path.endswith("out.safetensors")


def test_a_file_that_computes_something_else_is_a_failure_however_fast(tmp_path: Path) -> None:
    repconv_cli.fuse(small(), tmp_path / "out.safetensors", input=(2, 3, 8, 8))
    other = small()
    nn.init.ones_(other[0].weight)
    result = gains.bench(other, tmp_path / "out.safetensors", Options(input=((2, 3, 8, 8),)), QUICK)
    assert not result.verification
    assert result.exit_code(strict=False) == 1


def test_the_modes_of_the_users_module_are_as_they_were():
    module = small().train()
    gains.bench(module, None, Options(input=((2, 3, 8, 8),)), QUICK)
    assert all(part.training for part in module.modules())


def test_an_unknown_runtime_and_one_that_is_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--runtime 'tensorrt'; needed: one of eager, compile, onnxruntime, openvino"):
        runtimes.choose(("tensorrt",))
    monkeypatch.setattr(runtimes, "installed", lambda name: name == "eager")
    with pytest.raises(InputError, match=r"openvino is not installed. pip install 'repconv-cli\[openvino\]'"):
        runtimes.choose(("openvino",))
    assert runtimes.choose(()) == ["eager"]


def test_a_runtime_that_cannot_run_the_model_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setitem(runtimes.RUNTIMES, "eager", (broken, ("torch",)))
    result = gains.bench(small(), None, Options(input=((2, 3, 8, 8),)), QUICK)
    assert result.bench.runtimes[0].problem == "RuntimeError: no such operator"


def test_a_batch_that_is_fixed_is_told():
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 48).relu()

    with pytest.raises(InputError, match="--batch 3 for input x; needed: 2: its batch is fixed"):
        gains.bench(Fixed(), None, Options(input=((2, 3, 4, 4),)), replace(QUICK, batch=3))


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        ("gain", "GAIN  the fused model: 1.50× as fast in eager."),
        ("none", "NO GAIN  the fused model: no gain in eager."),
        ("loss", "NO GAIN  the fused model: 0.50× as fast in eager."),
    ],
)
def test_it_says_when_there_is_no_gain(gain: str, sentence: str) -> None:
    speedup = 0.5 if gain == "loss" else 1.5
    times = RuntimeFacts("eager", "torch 2", 2.0, 1.0, speedup, speedup, speedup, 9, gain)
    assert str(list(bench_screen(BenchFacts(((1, 3),), 1, "cpu", (times,))))[-1]) == sentence


@pytest.mark.parametrize("slower_by", [1, 100])
def test_the_table_fits_80_columns_with_no_name_cut(slower_by: int) -> None:
    versions = {"eager": "torch 2.14.1", "compile": "torch 2.14.1", "onnxruntime": "onnxruntime 1.32.0"}
    times = tuple(
        RuntimeFacts(
            name, version, 42.13 * slower_by, 31.9 * slower_by, 1.32, 1.28, 1.41, 21, "none",
            original_spread_ms=2.5 * slower_by, fused_spread_ms=2.5 * slower_by,
            original_peak_bytes=999_900_000, fused_peak_bytes=1_234_000_000,
        )
        for name, version in versions.items()
    )  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    for part in bench_screen(BenchFacts(((1, 3, 224, 224),), 1, "cpu", times)):
        console.print(part)
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in told
    for word in ("onnxruntime", "compile", "no gain", "1.28–1.41", "1.2 GB"):
        assert word in told


def test_the_command_prints_json(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "m.pt")
    done = run(
        "bench", str(tmp_path / "m.pt"), "--input", "1,3,8,8", "--runtime", "eager", "--seconds", "0.1", "--json"
    )
    assert done.exit_code == 0
    found = json.loads(done.stdout)["bench"]["runtimes"][0]
    assert found["runtime"] == "eager"
    assert found["gain"] in ("gain", "none", "loss")


def test_the_plot_draws_one_scale_and_tells_what_was_not_timed() -> None:
    result = gains.bench(small(), None, Options(input=((2, 3, 8, 8),)), QUICK)
    assert result.bench is not None
    timed = replace(
        result.bench.runtimes[0],
        original_ms=4.0, fused_ms=1.0, speedup=4.0, speedup_low=3.5, speedup_high=4.5, problem=None,
    )  # fmt: skip
    untimed = replace(
        timed, original_ms=None, fused_ms=None, speedup=None, speedup_low=None, speedup_high=None,
        problem="it is <not> installed",
    )  # fmt: skip
    drawing = ElementTree.fromstring(
        speed_plot(replace(result, bench=replace(result.bench, runtimes=(timed, untimed))))
    )
    bars = {bar.get("class"): float(bar.get("width", "nan")) for bar in drawing.findall(".//{*}rect")}
    assert bars["original"] == 4 * bars["fused"]
    texts = " ".join(text.text or "" for text in drawing.findall(".//{*}text"))
    assert "4.00× (3.50–4.50)" in texts
    assert "it is <not> installed" in texts


def test_the_command_writes_the_plot_and_refuses_another_kind_of_file(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "model.pt")
    command = ["bench", str(tmp_path / "model.pt"), "--input", "2,3,8,8", "--runtime", "eager", "--seconds", "0.2"]
    done = run(*command, "--plot", str(tmp_path / "times.svg"))
    assert done.exit_code == 0, done.output
    ElementTree.parse(tmp_path / "times.svg")
    done = run(*command, "--plot", str(tmp_path / "times.png"))
    assert done.exit_code == 2
    assert "needed: a name that ends in .svg" in done.output
    assert not (tmp_path / "times.png").exists()
