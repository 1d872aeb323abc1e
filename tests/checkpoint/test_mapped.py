"""Large files, mapped: the same bits as in memory, checked as strictly, and never written to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import repconv_cli
from repconv_cli.checkpoint import read, reading
from repconv_cli.errors import DamagedFileError, InputError
from repconv_cli.finite import is_finite
from tests.checkpoint.tensor_checks import same_tensors
from tests.checkpoint.test_torch_containers import DTYPES


@pytest.fixture(autouse=True)
def _every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAPPED_FROM_BYTES", 1)


def weights() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    found = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in DTYPES}
    found |= {"turned": base.permute(2, 0, 1), "strided": base[:, ::2, 1:], "scalar": torch.tensor(1.5)}
    return found | {"none": torch.empty(0, 3), "last": base.reshape(-1)[-1:], "big": torch.rand(1000, 999)}


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_mapped_tensors_have_the_same_bits(tmp_path: Path, form: str) -> None:
    wanted = weights()
    if form == "safetensors":
        wanted = {name: tensor.contiguous().clone() for name, tensor in wanted.items()}
        save_file(wanted, tmp_path / "w")
    else:
        dropped = DTYPES[-2:] if form == "legacy" else []
        wanted = {name: tensor for name, tensor in wanted.items() if tensor.dtype not in dropped}
        torch.save(wanted, tmp_path / "w", _use_new_zipfile_serialization=form == "zip")
    source = read(tmp_path / "w")
    assert source.tensors is not None
    same_tensors(source, {name: wanted[name] for name in source.tensors})
    assert set(source.tensors) == set(wanted)
    source.release()
    same_tensors(source, {name: wanted[name] for name in source.tensors})


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_writing_to_a_mapped_tensor_leaves_the_file_as_it_was(tmp_path: Path, form: str) -> None:
    tensors = {"w": torch.ones(1000)}
    torch.save(tensors, tmp_path / "w") if form == "zip" else save_file(tensors, tmp_path / "w")
    before = (tmp_path / "w").read_bytes()
    found = read(tmp_path / "w").tensors
    assert found is not None
    found["w"].zero_()
    assert (tmp_path / "w").read_bytes() == before
    assert found["w"].sum() == 0


def test_mapped_tensors_outlive_the_name_of_their_file(tmp_path: Path) -> None:
    save_file({"w": torch.full((100_000,), 3.0)}, tmp_path / "w")
    found = read(tmp_path / "w")
    (tmp_path / "w").unlink()
    (tmp_path / "w").write_bytes(b"another file")
    found.release()
    assert found.tensors is not None
    assert found.tensors["w"].sum() == 300_000


def test_a_flipped_bit_is_found_by_its_checksum_before_it_is_mapped(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    torch.save({"w": torch.full((1000,), 0.456)}, tmp_path / "w")
    content = bytearray((tmp_path / "w").read_bytes())
    content[content.index(torch.full((4,), 0.456).numpy().tobytes()) + 1000] ^= 1
    (tmp_path / "w").write_bytes(content)
    refused(tmp_path / "w", DamagedFileError, "fails its checksum")


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_nan_is_found(tmp_path: Path, refused, form: str) -> None:  # type: ignore[no-untyped-def]
    tensors = {"w": torch.tensor([1.0, float("nan"), float("-inf")])}
    torch.save(tensors, tmp_path / "w") if form == "zip" else save_file(tensors, tmp_path / "w")
    refused(tmp_path / "w", InputError, "w holds 2 values of 3 that are NaN or infinite")


def test_a_module_and_a_fused_model_are_in_memory_of_their_own(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    torch.save(net, tmp_path / "m.pt")
    assert read(tmp_path / "m.pt").files == ()
    repconv_cli.fuse(tmp_path / "m.pt", tmp_path / "o.safetensors", input=(1, 3, 8, 8))
    assert not read(tmp_path / "o.safetensors").files[0].is_mapped


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex])
def test_one_bad_value_is_seen_in_every_dtype_and_place(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-2, 2, 4001).to(dtype)
    assert is_finite(values)
    if dtype is torch.float8_e4m3fn and bad == bad:
        return  # it has no infinity
    for place in (0, 1234, 4000):
        spoilt = values.clone()
        spoilt[place] = torch.tensor(bad).to(dtype)
        assert not is_finite(spoilt)
        assert not is_finite(spoilt.reshape(1, -1).expand(3, -1))
