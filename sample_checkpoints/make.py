"""Train the sample networks and write every file of this folder that is not source: ``python make.py``.

One thread, fixed seeds: on one machine with one version of torch, two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import torch
from report import print_rdrop, write_readme
from safetensors.torch import save as safetensors_bytes
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from repconv_cli.training import RepConv, ScaledDropout, fit, mean_symmetric_kl

HERE = Path(__file__).resolve().parent
ALPHA = 2.0
EPOCHS = 14
TEST_IMAGES = 360
KL_PAIRS = 20
TEST_FILE = "digits_test.safetensors"


@dataclass(frozen=True)
class Sample:
    """One file to write: a trained network in one form and dtype, in training or eval mode."""

    file: str
    architecture: str
    form: str
    dtype: torch.dtype = torch.float32
    is_training: bool = False


SAMPLES = (
    Sample("repvgg_digits.pt", "repvgg_digits", "module", is_training=True),
    Sample("repvgg_digits.pt2", "repvgg_digits", "pt2"),
    Sample("repvgg_digits_float16.pt", "repvgg_digits", "module", dtype=torch.float16),
    Sample("repvgg_plain_digits.pt", "repvgg_plain_digits", "module"),
    Sample("repvgg_plain_digits_state.pt", "repvgg_plain_digits", "state_dict"),
    Sample("mobileone_digits_state.pt", "mobileone_digits", "state_dict"),
    Sample("grouped_digits.pt", "grouped_digits", "module"),
    Sample("grouped_digits.pt2", "grouped_digits", "pt2"),
)
ARCHITECTURES = tuple(dict.fromkeys(sample.architecture for sample in SAMPLES))


class Digits(NamedTuple):
    """Images ``(N, 1, 8, 8)`` in [0, 1], float32, and labels ``(N,)``, int64: for training and held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_digits() -> Digits:
    """Return scikit-learn's 1,797 digits, split once and for all with every class in the same share."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=TEST_IMAGES, stratify=labels.numpy(), random_state=0)
    return Digits(images[train], labels[train], images[test], labels[test])


def train(architecture: str, digits: Digits, alpha: float, epochs: int) -> nn.Module:
    """Return the named network trained from the one seed, in eval mode."""
    torch.manual_seed(0)
    model: nn.Module = getattr(architectures, architecture)()
    fit(model, digits.train_images, digits.train_labels, alpha=alpha, epochs=epochs)
    return model.eval()


def count_correct(predict: Callable[[Tensor], Tensor], digits: Digits, dtype: torch.dtype = torch.float32) -> int:
    """Return how many held-out digits get their own label."""
    with torch.no_grad():
        logits = predict(digits.test_images.to(dtype))
    return int((logits.argmax(dim=1) == digits.test_labels).sum())


def measure(model: nn.Module, digits: Digits) -> dict[str, float]:
    """Return the test accuracy and the mean KL between two dropout passes over the held-out digits."""
    correct = count_correct(model, digits)
    torch.manual_seed(0)
    kl = mean_symmetric_kl(model, digits.test_images, pairs=KL_PAIRS)
    return {"correct": correct, "accuracy": correct / TEST_IMAGES, "kl": kl}


def save(sample: Sample, model: nn.Module, path: Path) -> None:
    """Write ``model``, whose weights are the trained ones in float32, as ``sample`` says; the model is not changed."""
    copy: nn.Module = getattr(architectures, sample.architecture)()
    copy.load_state_dict(model.state_dict())
    copy.to(sample.dtype).train(sample.is_training).requires_grad_(False)
    if sample.form == "pt2":
        save_program(copy, path)
    else:
        torch.save(copy if sample.form == "module" else copy.state_dict(), path)


def save_program(model: nn.Module, path: Path) -> None:
    """Export ``model`` with the batch size free, without the paths of this machine's source files, and write it."""
    program = torch.export.export(
        model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def reload(sample: Sample, path: Path) -> Callable[[Tensor], Tensor]:
    """Return what the written file computes, in eval mode."""
    if sample.form == "pt2":
        return torch.export.load(path).module()
    model: nn.Module = getattr(architectures, sample.architecture)()
    if sample.form == "module":
        with torch.serialization.safe_globals([type(module) for module in model.modules()]):
            model = torch.load(path, weights_only=True)
    else:
        model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def describe(sample: Sample, path: Path, model: nn.Module, digits: Digits) -> dict[str, Any]:
    """Return the facts of a written file: what it is, what it predicts, and what fusing it must give."""
    modules = list(model.modules())
    blocks = sum(isinstance(module, RepConv) for module in modules)
    correct = count_correct(reload(sample, path), digits, sample.dtype)
    return {
        "file": sample.file,
        "form": sample.form,
        "architecture": sample.architecture,
        "dtype": str(sample.dtype).removeprefix("torch."),
        "training": sample.is_training,
        "bytes": path.stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "correct": correct,
        "accuracy": correct / TEST_IMAGES,
        "blocks": blocks,
        "convs": {"before": sum(isinstance(module, nn.Conv2d) for module in modules), "after": blocks},
        "norms": {"before": sum(isinstance(module, nn.BatchNorm2d) for module in modules), "after": 0},
        "scales": {"before": sum(isinstance(module, ScaledDropout) for module in modules), "after": 0},
    }


def make(out: Path, epochs: int) -> dict[str, Any]:
    """Train each network with and without R-Drop, write the files into ``out``, and return what was measured."""
    digits = read_digits()
    trained, rdrop = {}, []
    for architecture in ARCHITECTURES:
        plain = measure(train(architecture, digits, 0.0, epochs), digits)
        trained[architecture] = train(architecture, digits, ALPHA, epochs)
        rdrop.append({"architecture": architecture, "without": plain, "with": measure(trained[architecture], digits)})
        print_rdrop(rdrop[-1])
    out.mkdir(parents=True, exist_ok=True)
    held_out = {"images": digits.test_images, "labels": digits.test_labels}
    (out / TEST_FILE).write_bytes(safetensors_bytes(held_out))
    samples = []
    for sample in SAMPLES:
        save(sample, trained[sample.architecture], out / sample.file)
        samples.append(describe(sample, out / sample.file, trained[sample.architecture], digits))
    return {
        "data": {"file": TEST_FILE, "images": TEST_IMAGES, "input": [1, 8, 8], "classes": 10},
        "training": {"alpha": ALPHA, "epochs": epochs, "kl_pairs": KL_PAIRS},
        "samples": samples,
        "rdrop": rdrop,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the sample networks and write their files.")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder to write into (default: this one)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the digits (default: {EPOCHS})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    measured = make(options.out, options.epochs)
    (options.out / "samples.json").write_text(json.dumps(measured, indent=2) + "\n")
    write_readme(HERE / "README.md", options.out / "README.md", measured)
    total = sum(sample["bytes"] for sample in measured["samples"])
    print(f"{len(SAMPLES)} samples, {total:,} bytes, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
