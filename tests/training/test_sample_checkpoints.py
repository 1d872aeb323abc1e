"""The sample files: what samples.json and the README say of them is so, and make.py repeats bit for bit."""

import importlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repconv_cli.training import RepConv

FOLDER = Path(__file__).resolve().parents[2] / "sample_checkpoints"
FACTS = json.loads((FOLDER / "samples.json").read_text())
SAMPLES = {sample["file"]: sample for sample in FACTS["samples"]}
DIGITS = load_file(FOLDER / FACTS["data"]["file"])


@pytest.fixture(scope="module")
def scripts():
    """The folder's modules, imported as ``python make.py`` imports them."""
    names = ["architectures", "report", "make"]
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


def load(sample, architectures):
    """Return the file's content as a callable; no class but those of its own architecture is admitted."""
    model = getattr(architectures, sample["architecture"])()
    if sample["form"] == "pt2":
        return torch.export.load(FOLDER / sample["file"]).module()
    with torch.serialization.safe_globals([type(module) for module in model.modules()]):
        content = torch.load(FOLDER / sample["file"], weights_only=True)
    if sample["form"] == "state_dict":
        model.load_state_dict(content, strict=True)
        return model
    return content


def test_there_is_every_form_a_half_precision_file_and_every_kind_of_net():
    assert {sample["form"] for sample in SAMPLES.values()} == {"module", "state_dict", "pt2"}
    assert {sample["dtype"] for sample in SAMPLES.values()} == {"float32", "float16"}
    assert {sample["architecture"] for sample in SAMPLES.values()} == {
        "repvgg_digits",
        "repvgg_plain_digits",
        "mobileone_digits",
        "grouped_digits",
    }


@pytest.mark.parametrize("file", SAMPLES)
def test_the_file_predicts_as_well_as_it_says(file, scripts):
    sample = SAMPLES[file]
    predict = load(sample, scripts["architectures"])
    if sample["form"] != "pt2":
        assert sample["training"] is (sample["form"] == "module" and predict.training)
        predict.eval()
    with torch.no_grad():
        logits = predict(DIGITS["images"].to(getattr(torch, sample["dtype"])))
    assert str(logits.dtype) == f"torch.{sample['dtype']}"
    correct = int((logits.argmax(dim=1) == DIGITS["labels"]).sum())
    # Another processor rounds differently, and one digit may lie that close to two classes.
    assert abs(correct - sample["correct"]) <= 1
    assert sample["accuracy"] == sample["correct"] / len(DIGITS["labels"]) > 0.96


@pytest.mark.parametrize("file", SAMPLES)
def test_the_counts_are_those_of_the_architecture(file, scripts):
    sample = SAMPLES[file]
    modules = list(getattr(scripts["architectures"], sample["architecture"])().modules())
    convs = [module for module in modules if isinstance(module, nn.Conv2d)]
    blocks = [module for module in modules if isinstance(module, RepConv)]
    assert sample["convs"] == {"before": len(convs), "after": len(blocks)}
    assert sample["norms"] == {"before": sum(isinstance(module, nn.BatchNorm2d) for module in modules), "after": 0}
    assert sample["blocks"] == len(blocks)
    assert sum(len(list(block.modules())) for block in blocks) > 2 * len(convs)
    assert sample["bytes"] == (FOLDER / file).stat().st_size


@pytest.mark.parametrize("file", [file for file in SAMPLES if SAMPLES[file]["norms"]["before"]])
def test_every_norm_has_seen_the_whole_training(file, scripts):
    """At initial statistics a dropped norm would go unseen."""
    state = load(SAMPLES[file], scripts["architectures"]).state_dict()
    steps = FACTS["training"]["epochs"] * (1437 // 64)
    names = [key.removesuffix(".running_var") for key in state if key.endswith(".running_var")]
    assert len(names) == SAMPLES[file]["norms"]["before"]
    for name in names:
        assert state[f"{name}.num_batches_tracked"] == steps
        assert (state[f"{name}.running_mean"].abs() > 0).any()
        assert (state[f"{name}.weight"] - 1).abs().max() > 0.01


def test_all_forms_of_a_network_hold_the_same_weights(scripts):
    for architecture in {sample["architecture"] for sample in SAMPLES.values()}:
        files = [sample for sample in SAMPLES.values() if sample["architecture"] == architecture]
        first = load(files[0], scripts["architectures"]).state_dict()
        for other in files[1:]:
            state = load(other, scripts["architectures"]).state_dict()
            assert state.keys() == first.keys()
            assert all(torch.equal(first[key].to(value.dtype), value) for key, value in state.items())


def test_exported_programs_take_any_batch_and_name_no_source_file():
    for file in (file for file in SAMPLES if file.endswith(".pt2")):
        predict = torch.export.load(FOLDER / file).module()
        assert [predict(DIGITS["images"][:size]).shape[0] for size in (1, 2, 5)] == [1, 2, 5]
        with zipfile.ZipFile(FOLDER / file) as archive:
            assert not any(
                b"stack_trace" in archive.read(name) or b".py" in archive.read(name) for name in archive.namelist()
            )


def test_together_they_stay_under_five_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 5_000_000


def test_rdrop_lowers_the_divergence_of_every_network():
    assert len(FACTS["rdrop"]) == 4
    for row in FACTS["rdrop"]:
        assert 0 < row["with"]["kl"] < row["without"]["kl"]


def test_the_readme_holds_the_tables_of_samples_json(scripts, tmp_path):
    scripts["report"].write_readme(FOLDER / "README.md", tmp_path / "README.md", FACTS)
    assert (tmp_path / "README.md").read_text() == (FOLDER / "README.md").read_text()


def test_the_held_out_digits_are_those_of_the_split(scripts):
    digits = scripts["make"].read_digits()
    assert torch.equal(digits.test_images, DIGITS["images"])
    assert torch.equal(digits.test_labels, DIGITS["labels"])
    assert len(digits.train_labels) == 1437
    assert torch.bincount(digits.test_labels).tolist() == pytest.approx([36] * 10, abs=1)


def test_training_and_saving_again_gives_the_same_bytes(scripts, tmp_path):
    make = scripts["make"]
    digits = make.read_digits()
    samples = [sample for sample in make.SAMPLES if sample.architecture == "grouped_digits"]
    runs = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        model = make.train("grouped_digits", digits, alpha=2.0, epochs=1)
        for sample in samples:
            make.save(sample, model, tmp_path / run / sample.file)
        runs.append([(tmp_path / run / sample.file).read_bytes() for sample in samples])
    assert len(samples) == 2
    assert runs[0] == runs[1]
