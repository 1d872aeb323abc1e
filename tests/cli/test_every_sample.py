"""inspect, fuse and verify on every sample: exit code, both streams, and the JSON of DESIGN §7."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from repconv_cli import convert
from tests.cli.runs import SAMPLES, FusedSample, Sample, run

Fuse = Callable[[Sample], FusedSample]
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)

COMMON = {"source", "input", "blocks", "refusals", "totals"}
BLOCK = {"name", "kind", "sources", "target", "ops", "macs", "params", "certificate"}
TOTALS = {"convs", "norms", "ops", "params", "macs"}
VERIFICATION = {
    "verdict", "passed", "close", "max_abs", "max_rel", "noise", "ratio", "per_sample", "first_bad_block",
    "assumptions", "not_checked",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _trace_each_sample_once(monkeypatch: pytest.MonkeyPatch, trace_once: Callable[..., Any]) -> None:
    monkeypatch.setattr(convert, "trace_source", trace_once)


def one_document(stdout: str) -> dict[str, Any]:
    """The JSON on stdout, which must be all there is: one line, strictly JSON."""
    assert stdout.endswith("}\n")
    assert stdout.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found: dict[str, Any] = json.loads(stdout, parse_constant=refuse)
    return found


def assert_changes(found: dict[str, Any], names: set[str]) -> None:
    assert names <= set(found)
    for name in names:
        assert set(found[name]) == {"before", "after"}
        assert isinstance(found[name]["before"], int)
        assert found[name]["after"] <= found[name]["before"]


@every_sample
def test_inspect(sample: Sample) -> None:
    done = run("inspect", *sample.arguments)
    assert done.exit_code == 0, done.output
    counts = f"convolutions {_arrow(sample.convs)}, batch norms {_arrow(sample.norms)}"
    assert f"{sample.blocks} blocks can be fused: {counts}" in done.stdout
    assert f"Next: repconv fuse {sample.path}" in done.stdout
    phases = [line for line in done.stderr.splitlines() if line.endswith("…")]
    assert phases == ["Reading …", "Tracing …", "Analysing …"]
    as_json = run("inspect", *sample.arguments, "--json")
    assert as_json.exit_code == 0
    found = one_document(as_json.stdout)
    assert set(found) >= COMMON
    assert len(found["blocks"]) == sample.blocks
    for block in found["blocks"]:
        assert set(block) >= BLOCK
        assert block["certificate"] is None
        assert block["target"] in block["sources"]
        assert_changes(block, {"ops", "macs", "params"})
    assert_changes(found["totals"], TOTALS)
    assert (found["totals"]["convs"], found["totals"]["norms"]) == (sample.convs, sample.norms)
    assert found["verification"] is None
    assert found["input"]["examples"] == [[2, 1, 8, 8]]


def _arrow(change: dict[str, int]) -> str:
    return f"{change['before']} → {change['after']}"


@every_sample
def test_fuse(sample: Sample, fused: Fuse) -> None:
    done = fused(sample).run
    assert done.exit_code == 0, done.output
    found = one_document(done.stdout)
    assert COMMON | {"verification", "output"} <= set(found)
    assert set(found["verification"]) >= VERIFICATION
    assert (found["verification"]["verdict"], found["verification"]["passed"]) == ("pass", True)
    assert len(found["verification"]["per_sample"]) == 4
    assert found["output"]["path"] == str(fused(sample).path)
    assert found["output"]["size_bytes"] == fused(sample).path.stat().st_size
    assert "Writing …" in done.stderr
    assert "error" not in done.stderr


@every_sample
def test_inspect_promises_the_totals_that_fuse_delivers(sample: Sample, fused: Fuse) -> None:
    promised = one_document(run("inspect", *sample.arguments, "--json").stdout)
    delivered = fused(sample).report
    assert promised["totals"] == delivered["totals"]
    assert [b["name"] for b in promised["blocks"]] == [b["name"] for b in delivered["blocks"]]


@every_sample
def test_verify(sample: Sample, fused: Fuse) -> None:
    done = run("verify", *sample.arguments, fused(sample).path)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].startswith("PASS")
    assert "error" not in done.stderr
    as_json = run("verify", *sample.arguments, fused(sample).path, "--json", "--strict")
    assert as_json.exit_code == 0
    found = one_document(as_json.stdout)["verification"]
    assert set(found) >= VERIFICATION
    assert (found["verdict"], found["first_bad_block"], found["not_checked"]) == ("pass", None, [])
