"""The screens, drawn at a terminal's width: what fits, where lines break, and what stands last."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from repconv_cli.report.advice import advice_on
from repconv_cli.report.terminal import Report
from repconv_cli.report.words import percent
from repconv_cli.results import Change, Result, TensorFacts, Totals, Verification
from tests.report.made import BENCHED, DIFFERENT, FUSED, INSPECTED, LISTED, VERIFIED, block

ALL = {
    "inspect": INSPECTED,
    "fuse": FUSED,
    "verify": VERIFIED,
    "verify, fail": DIFFERENT,
    "bench": BENCHED,
    "weights": LISTED,
}
JOINTS = "./_,:=-\\"


def screen(result: Result, width: int = 80, **how: object) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(Report(result, **how))  # type: ignore[arg-type]
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_inspect_of_22_blocks_fits_a_terminal_of_80_by_40() -> None:
    lines = screen(INSPECTED)
    assert len(lines) < 40
    assert sum("3×3 + 1×1" in line for line in lines) == 8
    assert any(line.startswith("stages.2.1…13 ×13  3×3 + 1×1 + identity  192×192×3×3") for line in lines)
    assert lines[1].startswith("22 blocks can be fused: convolutions 44 → 22, batch norms 61 → 0, parameters")


@pytest.mark.parametrize("every", [False, True], ids=["folded", "all"])
@pytest.mark.parametrize("width", [76, 80, 120])
@pytest.mark.parametrize("result", ALL.values(), ids=ALL)
def test_no_line_is_longer_than_the_terminal_or_breaks_inside_a_word(result: Result, width: int, every: bool) -> None:
    options = ("--arch", "a/rather/long/folder/of/somebody/with/architectures.py:make_net", "--input", "1,3,224,224")
    whole = {word for line in screen(result, 10_000, every=every, options=options) for word in line.split()}
    for line in screen(result, width, every=every, options=options):
        assert len(line) <= width, line
        for word in line.split():
            is_part = any(word in other and (word[-1] in JOINTS or other.endswith(word)) for other in whole)
            assert word in whole or is_part or word == "\\", f"{word!r} in {line!r}"


def test_a_long_name_is_broken_after_a_dot_only() -> None:
    name = "backbone.encoder.stages.0.blocks.3.token_mixer.mixer.reparam_conv"
    lines = screen(replace(INSPECTED, blocks=(block(name),)))
    first = next(index for index, line in enumerate(lines) if line.startswith("backbone."))
    column = [line.split("  ")[0].strip() for line in lines[first : first + 4]]
    assert "".join(column).startswith(name)
    assert all(part[-1] in "._" for part in column[: column.index("reparam_conv")] if part)


def test_figures_that_a_narrow_screen_leaves_out_are_in_the_wide_one() -> None:
    assert not any("MACs" in line for line in screen(INSPECTED) if line.startswith("block"))
    assert any("MACs" in line for line in screen(INSPECTED, 120) if line.startswith("block"))


@pytest.mark.parametrize(
    ("result", "end"),
    [
        (VERIFIED, "PASS  the fused file computes what repvgg_a0.pt computes."),
        (
            DIFFERENT,
            "FAIL  do not use this file: its outputs are not those of repvgg_a0.pt. First block that",
        ),
    ],
)
def test_the_verdict_of_verify_is_its_last_line(result: Result, end: str) -> None:
    assert screen(result, 1000)[-1].startswith(end)


def test_a_failure_tells_the_block_the_place_and_what_it_looks_like() -> None:
    text = "\n".join(screen(DIFFERENT, 200))
    assert "stages.1.2.conv_kxk.conv.weight[4, 4, 1, 1] is 0.25, expected 1.25" in text
    assert "Looks like: the identity branch was left out of stages.1.2." in text


def test_verify_shows_each_sample_beside_its_noise() -> None:
    assert [line.split() for line in screen(VERIFIED) if line.startswith("  sample")] == [
        ["sample", str(index), "8.5e-06", "noise", "5.3e-06"] for index in range(1, 5)
    ]


@pytest.mark.parametrize(
    ("result", "command"),
    [(INSPECTED, "fuse repvgg_a0.pt OUT.safetensors"), (FUSED, "verify repvgg_a0.pt repvgg_a0.safetensors")],
)
def test_the_next_command_is_complete(result: Result, command: str) -> None:
    last = screen(result, 200, options=("--arch", "net.py:make net"))[-1]
    assert last == f"Next: repconv {command} --arch 'net.py:make net'"


def test_fuse_tells_the_size_before_and_after() -> None:
    assert any("36.7 MB → 33.2 MB" in line for line in screen(FUSED) if line.startswith("Wrote"))


def test_refusals_of_one_kind_share_a_line_with_what_would_change_them() -> None:
    text = "\n".join(screen(FUSED, 300))
    assert "Left as they are (4):" in text
    assert (
        "fc1 and 1 more: exact as one convolution, but 45.2 times the work (23 → 1,062 MACs); the others alike" in text
    )
    assert "stages.1.mlp.fc1" not in text
    assert "average fewer values. Exact with ceil_mode=False." in text
    assert advice_on("no such reason") is None


def test_details_add_keys_proofs_and_time() -> None:
    text = "\n".join(screen(FUSED, 200, details=True))
    assert "stages.3.0 → stages.3.0.conv_kxk.conv.weight   error 7.5e-16 of 1e-12" in text
    assert "from stem.conv_kxk.conv.weight, stem.conv_1x1.conv.weight" in text
    assert "Reading 0.2 s, Fusing 1.5 s" in text


def test_what_was_assumed_is_said_before_the_verdict() -> None:
    partial = Verification(
        "partial", True, None, None, None, None, None, None, None, None, assumptions=("BN eps 1e-05",)
    )
    assert screen(replace(VERIFIED, verification=partial))[-2:] == [
        "Assumed   BN eps 1e-05",
        "PARTIAL  nothing differs from repvgg_a0.pt, but not all was checked.",
    ]


def test_weights_of_a_known_family_say_what_can_be_fused_and_nothing_unknown() -> None:
    unknown = Change(None, None)
    blocks = tuple(replace(one, ops=unknown, macs=unknown) for one in INSPECTED.blocks)
    totals = Totals(unknown, unknown, unknown, Change(9_108_968, 8_309_384), unknown)
    for width in (80, 120):
        lines = screen(replace(LISTED, blocks=blocks, totals=totals), width)
        assert lines[1] == "22 blocks can be fused: parameters −8.8 %."
        assert next(line for line in lines if line.startswith("block")).split() == [
            "block", "branches", "weight", "parameters",
        ]  # fmt: skip
        assert "–" not in "".join(lines)
        assert lines[-2:] == ["", "Next: repconv fuse repvgg_a0.pt OUT.safetensors"]


def test_weights_of_no_known_family_ask_for_the_architecture() -> None:
    lines = screen(LISTED)
    assert lines[1] == "3 tensors with 48 float32 values."
    assert lines[-1] == "Next: repconv inspect repvgg_a0.pt --arch file.py:callable"


def test_weights_that_were_fused_before_need_nothing_more() -> None:
    unknown = Change(None, None)
    lines = screen(replace(LISTED, totals=Totals(unknown, unknown, unknown, Change(48, 48), unknown)))
    assert lines[1].startswith("Nothing to fuse")
    assert not any(line.startswith("Next") for line in lines)


def test_names_of_tensors_break_at_joints_only() -> None:
    name = "backbone.stages.0.downsample_of_the_shortcut.norm"
    tensors = tuple(TensorFacts(f"{name}.{leaf}", "float32", (8,)) for leaf in ("weight", "bias", "running_mean"))
    listed = replace(LISTED, contents=replace(LISTED.contents, tensors=tensors))  # type: ignore[type-var]
    lines = screen(listed, 76)
    first = next(index for index, line in enumerate(lines) if line.startswith("backbone"))
    parts = [line.split()[0] for line in lines[first : lines.index("", first)]]
    assert "".join(parts) == f"{name}.{{weight,bias,running_mean}}"
    assert all(part[-1] in "._,}" for part in parts)


def test_weights_that_differ_are_not_called_outputs() -> None:
    alone = replace(DIFFERENT.verification, max_abs=None)
    assert "FAIL  do not use this file: its weights are not those of" in "\n".join(
        screen(replace(DIFFERENT, verification=alone), 200)
    )


def test_a_small_change_is_not_told_as_none() -> None:
    assert percent(Change(11_689_512, 11_684_712)) == "−0.04 %"
