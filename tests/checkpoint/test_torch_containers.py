"""Round trips of torch checkpoints, with torch's own loader as the oracle."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from repconv_cli.checkpoint import FileFormat, read
from repconv_cli.errors import InputError
from tests.checkpoint.hostile_files import zip_file
from tests.checkpoint.tensor_checks import randomised, same_tensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.uint16, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dict_has_the_bits_torch_loads(tmp_path: Path, conv_net: nn.Module, zipped: bool, protocol: int) -> None:
    path = tmp_path / "weights.anything"
    torch.save(conv_net.state_dict(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    source = read(path)
    assert source.kind == "weights"
    assert source.format is (FileFormat.TORCH_ZIP if zipped else FileFormat.TORCH_LEGACY)
    same_tensors(source, torch.load(path, weights_only=False))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [1, 2, 5])
def test_module_computes_what_was_saved(tmp_path: Path, conv_net: nn.Module, zipped: bool, protocol: int) -> None:
    path = tmp_path / "model.pt"
    torch.save(conv_net, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    source = read(path)
    assert source.kind == "module"
    assert source.was_training is False
    assert source.module is not None
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(source.module(x), conv_net(x))
    same_tensors(source, conv_net.state_dict())


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True),
        nn.LSTM(4, 5, num_layers=2, bidirectional=True),
        nn.MultiheadAttention(8, 2),
        nn.ModuleDict({"a": nn.Conv1d(2, 3, 3), "b": nn.ModuleList([nn.PReLU(), nn.GroupNorm(1, 4)])}),
        nn.Upsample(scale_factor=2),
        nn.ConvTranspose3d(2, 3, 2, output_padding=0),
        nn.ParameterList([nn.Parameter(torch.ones(2))]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_layers_of_torch_come_back_whole(tmp_path: Path, model: nn.Module) -> None:
    torch.save(randomised(model), tmp_path / "model.pt")
    source = read(tmp_path / "model.pt")
    assert source.module is not None
    assert repr(source.module) == repr(model)
    same_tensors(source, model.state_dict())
    assert source.was_training


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_dtype_and_geometry_has_the_bits_torch_loads(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    # The two newest dtypes have no place in the legacy layout: torch cannot load them itself.
    dtypes = DTYPES if zipped else DTYPES[:-2]
    tensors = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in dtypes}
    tensors |= {"turned": base.permute(2, 0, 1), "strided": base[:, ::2, 1:], "scalar": torch.tensor(1.5)}
    tensors |= {"none": torch.empty(0, 3), "expanded": torch.ones(1, 3).expand(4, 3), "last": base.reshape(-1)[-1:]}
    torch.save(tensors, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    same_tensors(read(tmp_path / "weights.pt"), torch.load(tmp_path / "weights.pt", weights_only=True))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    torch.save(model, tmp_path / "model.pt")
    module = read(tmp_path / "model.pt").module
    assert isinstance(module, nn.Sequential)
    assert module[0].weight is module[1].weight
    assert module[0].weight.requires_grad


def test_a_checkpoint_zipped_again_gives_the_same_bits(tmp_path: Path, conv_net: nn.Module) -> None:
    import zipfile

    torch.save(conv_net.state_dict(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    again = zip_file(tmp_path / "b.pt", members, zipfile.ZIP_DEFLATED)
    same_tensors(read(again), conv_net.state_dict())


def test_plain_values_beside_the_weights_are_read(tmp_path: Path, conv_net: nn.Module) -> None:
    saved = {
        "epoch": 3, "best": 0.5, "name": "net", "flags": {1, 2}, "raw": b"\x00\xff", "shape": torch.Size([1, 2]),
        "dtype": torch.float16, "device": torch.device("cpu"), "none": None, "big": 1 << 100,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "state_dict": conv_net.state_dict(),
    }  # fmt: skip
    torch.save(saved, tmp_path / "checkpoint.pth")
    same_tensors(read(tmp_path / "checkpoint.pth"), conv_net.state_dict())


def test_tensors_with_attributes_are_read_without_them(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.no_decay = True  # type: ignore[attr-defined]
    plain = torch.zeros(3)
    plain.note = "x"  # type: ignore[attr-defined]
    torch.save({"weight": weight, "plain": plain}, tmp_path / "weights.pt")
    same_tensors(read(tmp_path / "weights.pt"), {"weight": weight.detach(), "plain": plain})


def test_the_record_tells_size_and_digest(tmp_path: Path) -> None:
    import hashlib

    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    source, content = read(tmp_path / "w.pt"), (tmp_path / "w.pt").read_bytes()
    assert (source.size_bytes, source.sha256) == (len(content), hashlib.sha256(content).hexdigest())


WRAPPED = [
    ("state_dict", lambda sd: {"state_dict": sd, "epoch": 1}, "'state_dict'"),
    ("ema first", lambda sd: {"model": {"x": torch.zeros(1)}, "ema": sd}, r"'ema', the averaged weights \(EMA\)"),
    ("nested", lambda sd: {"checkpoint": 1, "model": {"params": sd}}, "'params'"),
    ("module.", lambda sd: {f"module.{k}": v for k, v in sd.items()}, "prefix 'module.' off all"),
    ("compiled", lambda sd: {f"module._orig_mod.{k}": v for k, v in sd.items()}, "prefix '_orig_mod.' off all"),
    ("Lightning", lambda sd: {"state_dict": {f"model.{k}": v for k, v in sd.items()}}, "prefix 'model.' off all"),
]


@pytest.mark.parametrize(("wrap", "note"), [w[1:] for w in WRAPPED], ids=[w[0] for w in WRAPPED])
def test_wrappers_are_looked_through_and_told(tmp_path: Path, wrap, note: str) -> None:  # type: ignore[no-untyped-def]
    import re

    weights = OrderedDict(a=torch.ones(2), b=torch.zeros(3))
    torch.save(wrap(weights), tmp_path / "w.pt")
    source = read(tmp_path / "w.pt")
    same_tensors(source, dict(weights))
    assert re.search(note, " ".join(source.notes))


def test_a_prefix_that_not_all_keys_have_stays(tmp_path: Path) -> None:
    weights = {"module.a": torch.ones(2), "b.module.c": torch.zeros(3)}
    torch.save(weights, tmp_path / "w.pt")
    same_tensors(read(tmp_path / "w.pt"), weights)


def test_state_key_chooses_and_lists_what_there_is(tmp_path: Path) -> None:
    torch.save({"ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}, "x.y": 1}, tmp_path / "w.pt")
    same_tensors(read(tmp_path / "w.pt", state_key="model"), {"w": torch.zeros(1)})
    with pytest.raises(InputError, match=r"no entry student; needed: one of ema, model, x\.y"):
        read(tmp_path / "w.pt", state_key="student")


def test_a_module_inside_a_wrapper_is_found(tmp_path: Path, conv_net: nn.Module) -> None:
    torch.save({"epoch": 1, "model": conv_net}, tmp_path / "w.pt")
    assert read(tmp_path / "w.pt").kind == "module"


REFUSED_CONTENT = [
    ("nan", lambda: {"a.weight": torch.tensor([1.0, float("nan"), float("inf")])}, "a.weight holds 2 values of 3"),
    ("sparse", lambda: {"w": torch.eye(3).to_sparse()}, "sparse tensor"),
    ("meta", lambda: {"w": torch.empty(3, device="meta")}, "meta device"),
    ("quantized", lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "quantized tensor"),
    ("no weights", lambda: {"epoch": 1, "lr": 0.1}, "no weights; its entries are epoch, lr"),
    ("a list", lambda: [torch.ones(2)], "holds a list"),
    ("conjugated", lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, "conjugated"),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("saved", "reason"), [r[1:] for r in REFUSED_CONTENT], ids=[r[0] for r in REFUSED_CONTENT])
def test_content_that_cannot_be_fused_is_refused(tmp_path: Path, refused, saved, reason: str) -> None:  # type: ignore[no-untyped-def]
    torch.save(saved(), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", InputError, reason)


def test_trusted_packages_may_have_module_classes(tmp_path: Path, monkeypatch, refused) -> None:  # type: ignore[no-untyped-def]
    import sys

    from repconv_cli.errors import UnsafeFileError

    (tmp_path / "vouched").mkdir()
    text = "from torch import nn\nclass Block(nn.Module):\n    def forward(self, x): return x + 1\nclass Plain: pass\n"
    (tmp_path / "vouched" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import vouched  # type: ignore[import-not-found]

    torch.save(vouched.Block(), tmp_path / "m.pt")
    plain = vouched.Plain()
    plain.x = 1
    torch.save(plain, tmp_path / "p.pt")
    refused(tmp_path / "m.pt", UnsafeFileError, "vouched.Block")
    assert type(read(tmp_path / "m.pt", trust=["vouched"]).module) is vouched.Block
    refused(
        tmp_path / "p.pt", InputError, "vouched.Plain has no table of modules, so it is not a module", trust=["vouched"]
    )
    sys.modules.pop("vouched", None)
