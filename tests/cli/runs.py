"""Runs of the command: inside this process, or as a process of its own; and the samples to run it on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from typer.testing import CliRunner, Result

from repconv_cli.cli.main import app

FOLDER = Path(__file__).resolve().parents[2] / "sample_checkpoints"
ARCHITECTURES = FOLDER / "architectures.py"
INPUT = ("--input", "1,1,8,8")


@dataclass(frozen=True)
class Sample:
    """One entry of ``samples.json``."""

    file: str
    form: str
    architecture: str
    dtype: torch.dtype
    training: bool
    correct: int
    blocks: int
    convs: dict[str, int]
    norms: dict[str, int]

    @property
    def path(self) -> Path:
        return FOLDER / self.file

    @property
    def arguments(self) -> tuple[str, ...]:
        """SOURCE, and the options that it needs."""
        arch = ("--arch", f"{ARCHITECTURES}:{self.architecture}") if self.form == "state_dict" else ()
        return (str(self.path), *arch, *INPUT)


@dataclass(frozen=True)
class FusedSample:
    """A sample's fused file, and the run that made it."""

    path: Path
    run: Result

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.run.stdout)


def _samples() -> list[Sample]:
    names = Sample.__dataclass_fields__
    found = json.loads((FOLDER / "samples.json").read_text())["samples"]
    return [
        Sample(**{k: getattr(torch, v) if k == "dtype" else v for k, v in one.items() if k in names}) for one in found
    ]


SAMPLES = {sample.file: sample for sample in _samples()}


def run(*arguments: object) -> Result:
    """Run ``repconv`` inside this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fuse_sample(sample: Sample, folder: Path) -> FusedSample:
    out = folder / f"{sample.file}.safetensors"
    return FusedSample(out, run("fuse", *sample.arguments, out, "--json"))


def run_process(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this command line, both streams piped."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=child_environment(**environment),
    )


def child_environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


def architectures() -> ModuleType:
    """The module beside the samples, imported from its file."""
    spec = importlib.util.spec_from_file_location("_sample_architectures", ARCHITECTURES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def original(sample: Sample) -> nn.Module:
    """The sample as torch itself reads it, in eval mode: the oracle for every answer."""
    if sample.form == "pt2":
        return torch.export.load(sample.path).module()
    model: nn.Module = getattr(architectures(), sample.architecture)()
    with torch.serialization.safe_globals([type(part) for part in model.modules()]):
        content = torch.load(sample.path, weights_only=True)
    if sample.form == "state_dict":
        model.load_state_dict(content, strict=True)
        return model.eval()
    return content.eval()
