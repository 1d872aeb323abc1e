"""What must hold on every sample: one conv a block, proven, with the same answers, from a file that stands alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repconv_cli.convert import load
from tests.cli.runs import ARCHITECTURES, INPUT, SAMPLES, FusedSample, Sample, original, run, run_process

Fuse = Callable[[Sample], FusedSample]
DIGITS = load_file(SAMPLES["repvgg_digits.pt"].path.parent / "digits_test.safetensors")
LABELS = DIGITS["labels"]
PROOF = 1e-12

every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


def answers(model: nn.Module, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(DIGITS["images"].to(dtype))
    assert logits.dtype == dtype
    return logits


@every_sample
def test_each_block_becomes_one_conv_and_no_norm_is_left(sample: Sample, fused: Fuse) -> None:
    made = fused(sample)
    assert made.run.exit_code == 0, made.run.output
    totals = made.report["totals"]
    assert (totals["convs"], totals["norms"]) == (sample.convs, sample.norms)
    assert len(made.report["blocks"]) == sample.blocks
    convs = [node for node in load(made.path).held_program.graph.nodes if "conv2d" in str(node.target)]
    norms = [node for node in load(made.path).held_program.graph.nodes if "norm" in str(node.target)]
    assert (len(convs), len(norms)) == (sample.convs["after"], 0)
    assert made.report["refusals"] == []


@every_sample
def test_each_block_is_proven(sample: Sample, fused: Fuse) -> None:
    blocks = fused(sample).report["blocks"]
    assert len(blocks) == sample.blocks
    for block in blocks:
        assert 0 <= block["certificate"]["error"] <= block["certificate"]["limit"] <= PROOF


@every_sample
def test_the_answers_are_the_same_to_the_last_image(sample: Sample, fused: Fuse) -> None:
    before, after = answers(original(sample), sample.dtype), answers(load(fused(sample).path), sample.dtype)
    changed = before.argmax(1) != after.argmax(1)
    if sample.dtype == torch.float16:
        # Two scores as close as the original's own rounding have no order in float16.
        exact = answers(original(sample).double(), torch.float64)
        noise = (before.double() - exact).abs().max()
        best = before.double().topk(2, dim=1).values
        changed &= best[:, 0] - best[:, 1] > 2 * noise
    assert not changed.any()
    correct = int((after.argmax(1) == LABELS).sum())
    assert abs(correct - sample.correct) <= (sample.dtype == torch.float16)


STANDS_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("repconv_cli.training") or name in ("architectures", "sample_checkpoints"):
            raise ImportError(name + " is not on this machine")
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
from repconv_cli.convert import load
try:
    import repconv_cli.training
except ImportError:
    digits, out, *files = sys.argv[1:]
    images = load_file(digits)["images"]
    found = {}
    with torch.no_grad():
        for index, file in enumerate(files):
            model = load(file)
            dtype = next(model.parameters()).dtype
            found[str(index)] = model(images.to(dtype)).contiguous()
    save_file(found, out)
"""


def test_the_files_run_where_no_class_of_the_model_exists(fused: Fuse, tmp_path: Path) -> None:
    digits = SAMPLES["repvgg_digits.pt"].path.parent / "digits_test.safetensors"
    files = [fused(sample).path for sample in SAMPLES.values()]
    done = run_process("-c", STANDS_ALONE, digits, tmp_path / "logits.safetensors", *files)
    assert done.returncode == 0, done.stderr
    elsewhere = load_file(tmp_path / "logits.safetensors")
    assert len(elsewhere) == len(SAMPLES)
    for index, sample in enumerate(SAMPLES.values()):
        assert torch.equal(elsewhere[str(index)], answers(load(fused(sample).path), sample.dtype)), sample.file


def test_fusing_twice_gives_the_same_bytes(fused: Fuse, tmp_path: Path) -> None:
    sample = SAMPLES["grouped_digits.pt"]
    first = fused(sample).path
    torch.manual_seed(123)
    assert run("fuse", *sample.arguments, tmp_path / "again.safetensors").exit_code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("repvgg_digits.pt", "repvgg_digits.pt2"),
        ("grouped_digits.pt", "grouped_digits.pt2"),
        ("repvgg_plain_digits.pt", "repvgg_plain_digits_state.pt"),
    ],
)
def test_equal_weights_in_another_container_fuse_to_equal_tensors(left: str, right: str, fused: Fuse) -> None:
    one, two = load_file(fused(SAMPLES[left]).path), load_file(fused(SAMPLES[right]).path)
    assert set(one) == set(two)
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


def test_weights_in_a_safetensors_file_fuse_to_the_same_tensors(fused: Fuse, tmp_path: Path) -> None:
    sample = SAMPLES["repvgg_plain_digits_state.pt"]
    save_file(original(sample).state_dict(), tmp_path / "weights.safetensors")
    out = tmp_path / "out.safetensors"
    arch = ("--arch", f"{ARCHITECTURES}:{sample.architecture}")
    assert run("fuse", tmp_path / "weights.safetensors", out, *arch, *INPUT).exit_code == 0
    wanted, found = load_file(fused(sample).path), load_file(out)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_fused_file_fused_again_changes_nothing_and_says_so(fused: Fuse, tmp_path: Path) -> None:
    first, again = fused(SAMPLES["grouped_digits.pt"]).path, tmp_path / "again.safetensors"
    done = run("fuse", first, again)
    assert done.exit_code == 0
    assert "Nothing to fuse" in done.stdout
    before, after = load_file(first), load_file(again)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_fused_file_fused_again_under_strict_is_no_success(fused: Fuse, tmp_path: Path) -> None:
    done = run("fuse", fused(SAMPLES["grouped_digits.pt"]).path, tmp_path / "again.safetensors", "--strict")
    assert done.exit_code == 1
    assert not (tmp_path / "again.safetensors").exists()


@every_sample
def test_a_module_saved_in_training_mode_is_reported(sample: Sample, fused: Fuse) -> None:
    source = fused(sample).report["source"]
    assert source["was_training"] is sample.training
    assert any("training mode" in note for note in source["notes"]) is sample.training
