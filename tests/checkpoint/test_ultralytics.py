"""ultralytics' training checkpoints: the model as pickled classes, in half precision, its average beside it."""

from __future__ import annotations

import datetime
import os
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import repconv_cli
from repconv_cli.checkpoint import read
from repconv_cli.errors import UnsafeFileError
from tests.checkpoint.tensor_checks import same_tensors

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "YOLO_CONFIG_DIR": tempfile.gettempdir()}


@pytest.fixture(scope="module")
def model() -> Any:
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    made = DetectionModel("yolov9t.yaml", nc=3, verbose=False)
    made.args, made.names = deepcopy(DEFAULT_CFG), {0: "a", 1: "b", 2: "c"}
    for part in made.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainer saves after an epoch: entries, types and precision."""
    path = tmp_path_factory.mktemp("yolo") / "last.pt"
    saved = {
        "epoch": 1, "best_fitness": 0.5, "model": None, "ema": deepcopy(model).half(), "updates": 3,
        "optimizer": {"state": {}, "param_groups": []}, "scaler": {}, "train_args": vars(model.args),
        "train_metrics": {}, "train_results": {"epoch": [1.0]}, "date": datetime.datetime.now().isoformat(),
        "version": "8.4", "git": {"root": "."}, "license": "AGPL-3.0", "docs": "https://docs.ultralytics.com",
    }  # fmt: skip
    torch.save(saved, path)
    return path


def test_without_trust_each_class_is_named_with_the_flag(checkpoint: Path, refused) -> None:  # type: ignore[no-untyped-def]
    message = str(refused(checkpoint, UnsafeFileError, r"ultralytics\.nn\.tasks\.DetectionModel"))
    assert "--trust ultralytics" in message


def test_the_average_is_read_with_trust(checkpoint: Path, model: Any) -> None:
    source = read(checkpoint, trust=["ultralytics"])
    same_tensors(source, deepcopy(model).half().state_dict())
    told = " ".join(source.notes)
    assert "looked inside the entry 'ema', the averaged weights (EMA)" in told
    assert "not needed and not read: epoch" in told
    assert "objects in the module that were not read: ultralytics.utils.IterableSimpleNamespace" in told


def test_it_fuses(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = repconv_cli.fuse(checkpoint, out, trust=("ultralytics",), input=(1, 3, 64, 64), samples=1)
    assert result.verification
    assert result.totals is not None
    assert result.totals.norms.after == 0
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.eval()(x)[0]
        found = repconv_cli.load(out).float()(x)[0]
    # The weights were rounded to half precision when they were saved.
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-2
