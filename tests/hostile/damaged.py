"""Every sample in every container, and what must hold of a damaged one."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from repconv_cli.checkpoint import Source, read
from repconv_cli.errors import RepconvError
from tests.cli.runs import SAMPLES, run
from tests.hostile.judge import Outcome, judge
from tests.hostile.mutations import members


@dataclass(frozen=True)
class Victim:
    """A file that is to be damaged: its bytes, and the options that it is fused with."""

    name: str
    content: bytes
    options: tuple[str, ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def victims(folder: Path) -> list[Victim]:
    """Return the samples, and some of them in the containers that no sample comes in; ``folder`` is for scratch."""
    found = [
        _victim(sample.file, sample.path.read_bytes(), folder, sample.arguments[1:]) for sample in SAMPLES.values()
    ]
    state = SAMPLES["repvgg_plain_digits_state.pt"]
    weights = torch.load(state.path, weights_only=True)
    found.append(_victim("repvgg_plain_digits.safetensors", save(weights), folder, state.arguments[1:]))
    found.append(_victim("repvgg_plain_digits_legacy.pth", _legacy(weights), folder, state.arguments[1:]))
    module = read(SAMPLES["grouped_digits.pt"].path).module
    found.append(
        _victim("grouped_digits_legacy.pth", _legacy(module), folder, SAMPLES["grouped_digits.pt"].arguments[1:])
    )
    fused = folder / "fused.safetensors"
    assert run("fuse", *SAMPLES["grouped_digits.pt"].arguments, fused, "--force").exit_code == 0
    found.append(_victim("grouped_digits_fused.safetensors", fused.read_bytes(), folder))
    return found


def _legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _victim(name: str, content: bytes, folder: Path, options: tuple[str, ...] = ()) -> Victim:
    path = folder / name
    path.write_bytes(content)
    return Victim(name, content, options, tensors_of(read(path)))


def tensors_of(source: Source) -> dict[str, torch.Tensor]:
    """Return what a source holds by name."""
    if source.module is not None:
        return source.module.state_dict()
    return dict(source.tensors if source.program is None else source.program.tensors)  # type: ignore[arg-type]


def judge_damaged(victim: Victim, content: bytes, folder: Path) -> Outcome:
    """Return how a damaged file fares: refused; read as if it were whole; or fused, and verified against itself.

    The last takes seconds, so it is left out where all that was damaged is what no reader looks at.
    """
    (folder / "in").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    path, out = folder / "in" / victim.name, folder / "out" / "model.safetensors"
    path.write_bytes(content)
    try:
        if _same_members(victim.content, content):
            same = _same_tensors(tensors_of(read(path)), victim.tensors)
            return Outcome(0, wrong=[] if same else ["other tensors than in the whole file"])
    except RepconvError:
        pass  # Refused: how it is said is judged below.
    found = judge(path, out, *victim.options)
    out.unlink(missing_ok=True)
    return found


def _same_members(whole: bytes, damaged: bytes) -> bool:
    if not damaged.startswith(b"PK"):
        return damaged == whole
    try:
        return members(damaged) == members(whole)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError):
        return False


def _same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return list(found) == list(wanted) and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and torch.equal(found[name], tensor)
        for name, tensor in wanted.items()
    )
