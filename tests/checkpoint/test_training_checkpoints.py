"""Checkpoints as training scripts save them: weights among records of the run, which are never made."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import os
import pathlib
import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from repconv_cli.checkpoint import read
from repconv_cli.errors import InputError, TraceError, UnsafeFileError
from tests.checkpoint.hostile_files import Calls, checkpoint
from tests.checkpoint.tensor_checks import randomised, same_tensors

CREATED: list[str] = []


class Noisy:
    """Tells when an instance is made or given its state: reading a checkpoint must do neither."""

    def __init__(self) -> None:
        self.width = 3

    def __setstate__(self, state: Any) -> None:
        CREATED.append("state")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_make_noisy, (), {"width": 3})


def _make_noisy() -> Noisy:
    CREATED.append("made")
    return Noisy()


class Mode(enum.Enum):
    TRAIN = "train"


@dataclasses.dataclass
class Config:
    width: int = 3
    steps: Any = dataclasses.field(default_factory=lambda: defaultdict(list, {"lr": [1]}))


class Schedule(OrderedDict):  # type: ignore[type-arg]
    pass


RECORDS = {
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/runs"), nested=argparse.Namespace(a=1)),
    "config": Config(),
    "mode": Mode.TRAIN,
    "by mode": {Mode.TRAIN: 1, (1, Mode.TRAIN): 2},
    "when": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
    "best": np.float64(0.5),
    "history": np.arange(6).reshape(2, 3),
    "rng": np.random.default_rng(0).bit_generator.state,
    "meters": defaultdict(list, {"loss": [1.0]}),
    "schedule": Schedule(a=1),
    "class": Config,
    "noisy": Noisy(),
    "criterion": nn.CrossEntropyLoss(),
    "fraction": complex(1, 2),
    "raw": bytearray(b"abc"),
    "frozen": frozenset([1, 2]),
    "set": {Mode.TRAIN, (1, 2), 0.5},
    "ordered": OrderedDict([(1, 2), ("a", Mode.TRAIN)]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("record", RECORDS)
def test_a_record_beside_the_weights_is_not_made_and_told(
    tmp_path: Path, conv_net: nn.Module, record: str, protocol: int, zipped: bool
) -> None:
    saved = {record: RECORDS[record], "state_dict": conv_net.state_dict(), "after": RECORDS[record]}
    torch.save(saved, tmp_path / "w.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    CREATED.clear()
    source = read(tmp_path / "w.pth")
    same_tensors(source, conv_net.state_dict())
    assert CREATED == []
    told = " ".join(source.notes)
    assert "not needed and not read: " in told
    assert record in told


def test_the_name_of_what_was_not_made_is_told(tmp_path: Path, conv_net: nn.Module) -> None:
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": conv_net.state_dict()}, tmp_path / "w.pth")
    assert "not needed and not read: args (argparse.Namespace)" in read(tmp_path / "w.pth").notes


def test_a_timm_training_checkpoint_gives_its_average(tmp_path: Path, conv_net: nn.Module) -> None:
    average = {key: value + 1 for key, value in conv_net.state_dict().items()}
    saved = {
        "epoch": 3, "arch": "repvgg_a0", "state_dict": conv_net.state_dict(), "optimizer": trained(conv_net),
        "version": 2, "args": argparse.Namespace(model="repvgg_a0"), "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": average, "metric": 71.2,
    }  # fmt: skip
    torch.save(saved, tmp_path / "last.pth.tar")
    source = read(tmp_path / "last.pth.tar")
    same_tensors(source, average)
    assert "'state_dict_ema', the averaged weights (EMA); --state-key can choose state_dict instead" in source.notes[0]
    assert "optimizer" in source.notes[1]
    same_tensors(read(tmp_path / "last.pth.tar", state_key="state_dict"), conv_net.state_dict())


def trained(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()


@pytest.fixture
def foreign_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make classes of packages that need not be installed, as pickles name them."""

    def make(module: str, name: str, base: type = object) -> type:
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        made = type(name, (base,), {"__module__": module})
        setattr(sys.modules[module], name, made)
        return made

    return make


@pytest.mark.parametrize(
    "named",
    [
        ("lightning.fabric.utilities.data", "AttributeDict", dict),
        ("omegaconf.dictconfig", "DictConfig", object),
        ("yacs.config", "CfgNode", dict),
        ("easydict", "EasyDict", dict),
    ],
    ids=lambda named: named[1],
)
def test_lightning_with_any_kind_of_settings(tmp_path: Path, conv_net, foreign_class, named) -> None:  # type: ignore[no-untyped-def]
    settings = foreign_class(*named)()
    settings.lr = 0.1
    if named[2] is dict:
        settings["width"] = 3
    saved = {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in conv_net.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint{}": {"best": torch.tensor(1.0)}},
        "optimizer_states": [trained(conv_net)], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": settings,
    }  # fmt: skip
    torch.save(saved, tmp_path / "last.ckpt")
    for name in {part.partition(".")[0] for part in sys.modules if part.startswith(named[0].partition(".")[0])}:
        sys.modules.pop(name)
    source = read(tmp_path / "last.ckpt")
    same_tensors(source, conv_net.state_dict())
    told = " ".join(source.notes)
    assert "'state_dict' of a Lightning checkpoint" in told
    assert f"hyper_parameters ({named[0]}.{named[1]})" in told
    assert "took the prefix 'model.' off all" in told


def test_the_averaged_weights_of_an_unread_object_are_not_passed_over_in_silence(tmp_path: Path, conv_net) -> None:  # type: ignore[no-untyped-def]
    torch.save({"ema": Config(), "model": conv_net.state_dict()}, tmp_path / "w.pt")
    source = read(tmp_path / "w.pt")
    same_tensors(source, conv_net.state_dict())
    name = f"{__name__}.Config"
    assert f"the averaged weights (EMA) in 'ema' are a {name}, and not read" in source.notes


def test_an_average_with_its_counter_beside_it(tmp_path: Path, conv_net: nn.Module) -> None:
    saved = {"ema": {"module": conv_net.state_dict(), "updates": 9}, "model": {"w": torch.ones(1)}, "epoch": 1}
    torch.save(saved, tmp_path / "w.pt")
    same_tensors(read(tmp_path / "w.pt"), conv_net.state_dict())


IN_THE_WEIGHTS = [
    ("a tensor's place", lambda w: {"state_dict": {**w, "0.weight": np.ones((4, 3, 3, 3))}}, r"numpy.*_reconstruct"),
    ("beside flat weights", lambda w: {**w, "args": argparse.Namespace()}, r"argparse\.Namespace"),
    ("all there is", lambda w: argparse.Namespace(weights=w), r"argparse\.Namespace"),
    ("the chosen wrapper", lambda w: {"model": Config(), "epoch": 1}, r"Config"),
    ("a subclass of a dict", lambda w: {"state_dict": Schedule(w)}, r"Schedule"),
]


@pytest.mark.parametrize(("wrap", "reason"), [c[1:] for c in IN_THE_WEIGHTS], ids=[c[0] for c in IN_THE_WEIGHTS])
def test_what_is_not_admitted_is_refused_in_the_weights(tmp_path: Path, conv_net, refused, wrap, reason: str) -> None:  # type: ignore[no-untyped-def]
    torch.save(wrap(conv_net.state_dict()), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", UnsafeFileError, reason)


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [(os.mkdir, "marker", "posix.mkdir"), (eval, "1", "builtins.eval"), (exec, "1", "builtins.exec")],
)
def test_a_file_that_would_act_is_refused_even_beside_the_weights(  # type: ignore[no-untyped-def]
    tmp_path: Path, conv_net, refused, function, argument: str, name: str
) -> None:
    torch.save({"state_dict": conv_net.state_dict(), "x": Calls(function, argument)}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", UnsafeFileError, name.replace(".", r"\."))
    assert not Path("marker").exists()


def test_only_what_is_used_is_read_from_the_file(tmp_path: Path, conv_net: nn.Module) -> None:
    """A damaged momentum of the optimizer does not touch the weights; a damaged weight is still found."""
    from repconv_cli.errors import DamagedFileError

    momentum, path = torch.full((1000,), 0.123), tmp_path / "w.pt"
    torch.save({"state_dict": {"w": torch.full((1000,), 0.456)}, "optimizer": momentum}, path)
    content = path.read_bytes()
    for value, outcome in ((0.123, "read"), (0.456, "refused")):
        raw = torch.full((1000,), value).numpy().tobytes()
        path.write_bytes(content.replace(raw, raw[:-1] + b"\x00"))
        if outcome == "read":
            same_tensors(read(path), {"w": torch.full((1000,), 0.456)})
        else:
            with pytest.raises(DamagedFileError, match="fails its checksum"):
                read(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_half_precision_tied_and_turned_weights(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    base = torch.rand(6, 4).to(dtype)
    weights = {"tied": base, "tied too": base, "turned": base.t(), "strided": base[::2, 1:], "row": base[3]}
    torch.save({"model": weights, "epoch": 1}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    source = read(tmp_path / "w.pth")
    same_tensors(source, weights)
    assert source.tensors is not None
    assert source.tensors["tied"].data_ptr() == source.tensors["tied too"].data_ptr()


def test_a_module_works_without_an_object_that_it_does_not_use(tmp_path: Path, conv_net: nn.Module) -> None:
    conv_net.args = argparse.Namespace(lr=0.1)  # type: ignore[assignment]
    conv_net.history = [Config(), {"mode": Mode.TRAIN}]  # type: ignore[assignment]
    torch.save({"model": conv_net}, tmp_path / "w.pt")
    source = read(tmp_path / "w.pt")
    assert source.module is not None
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(source.module(x), conv_net(x))
    assert any("objects in the module that were not read: argparse.Namespace" in note for note in source.notes)


def test_a_module_that_uses_such_an_object_says_so(tmp_path: Path) -> None:
    import repconv_cli

    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2)).eval()
    layer[1].mode = Mode.TRAIN  # type: ignore[assignment]
    torch.save(layer, tmp_path / "w.pt")
    with pytest.raises((TraceError, InputError), match=r"the model uses a .*Mode, which is not read"):
        repconv_cli.inspect(tmp_path / "w.pt", input=(1, 3, 8, 8))


WRAPPERS = [("DataParallel", nn.DataParallel), ("AveragedModel", torch.optim.swa_utils.AveragedModel)]


@pytest.mark.parametrize(("name", "wrap"), WRAPPERS, ids=[w[0] for w in WRAPPERS])
def test_a_wrapper_around_a_whole_module_is_looked_through(tmp_path: Path, conv_net, name: str, wrap) -> None:  # type: ignore[no-untyped-def]
    torch.save({"model": wrap(conv_net)}, tmp_path / "w.pt")
    source = read(tmp_path / "w.pt")
    assert type(source.module) is nn.Sequential
    same_tensors(source, conv_net.state_dict())
    assert f"looked inside the {name} around the module" in source.notes


@pytest.mark.parametrize("place", ["_modules", "_parameters", "_buffers"])
def test_an_object_in_a_modules_own_parts_is_refused(tmp_path: Path, conv_net, refused, place: str) -> None:  # type: ignore[no-untyped-def]
    getattr(randomised(conv_net), place)["x"] = Config()
    torch.save(conv_net, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", UnsafeFileError, "Config")


def test_the_error_names_the_flag_that_would_admit_a_package(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    import timm

    torch.save(timm.create_model("repvgg_a0").stem, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", UnsafeFileError, "--trust timm admits")


def test_a_package_that_is_not_installed_is_not_advised_for_trust(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    checkpoint(tmp_path / "w.pt", b"\x80\x02}X\x01\x00\x00\x00wctorgh.nn\nLinear\n)\x81s.")
    assert "--trust" not in str(refused(tmp_path / "w.pt", UnsafeFileError, "torgh.nn.Linear"))
