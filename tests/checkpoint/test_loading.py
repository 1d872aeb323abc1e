"""Weights in a module that they belong to, but for what is not one to one: ties, prefixes, unsaved buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import repconv_cli
from repconv_cli.errors import InputError


def test_tied_weights_that_a_file_holds_once_have_their_place(tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text(TIED)
    weights = {"first.weight": torch.rand(4, 4, 1, 1), "first.bias": torch.rand(4), "norm.weight": torch.rand(4)}
    weights |= {"norm.bias": torch.rand(4), "norm.running_mean": torch.rand(4), "norm.running_var": torch.rand(4) + 1}
    weights |= {"norm.num_batches_tracked": torch.tensor(3), "second.bias": torch.rand(4), "grid": torch.rand(1)}
    save_file(weights, tmp_path / "w.safetensors")
    arch = f"{tmp_path / 'arch.py'}:make"
    result = repconv_cli.fuse(tmp_path / "w.safetensors", tmp_path / "o.safetensors", arch=arch, input=(1, 4, 5, 5))
    assert result.verification
    assert "1 buffers that the architecture does not save were taken over" in result.source.notes
    x = torch.rand(1, 4, 5, 5)
    weight = weights["first.weight"]
    y = nn.functional.conv2d(x, weight, weights["first.bias"])
    y = (y - weights["norm.running_mean"].view(-1, 1, 1)) / (weights["norm.running_var"].view(-1, 1, 1) + 1e-5).sqrt()
    y = y * weights["norm.weight"].view(-1, 1, 1) + weights["norm.bias"].view(-1, 1, 1)
    y = nn.functional.conv2d(y.relu() + weights["grid"], weight, weights["second.bias"])
    torch.testing.assert_close(repconv_cli.load(tmp_path / "o.safetensors")(x), y)


TIED = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.second.weight = self.first.weight
        self.register_buffer("grid", torch.zeros(1), persistent=False)
    def forward(self, x):
        return self.second(self.norm(self.first(x)).relu() + self.grid)
def make():
    return Net()
"""


NAMED_MODEL = """
from torch import nn
def make():
    return Net()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Conv2d(3, 4, 1)
    def forward(self, x):
        return self.model(x)
"""


def test_a_prefix_that_the_architecture_has_itself_stays(tmp_path: Path) -> None:
    (tmp_path / "arch.py").write_text(NAMED_MODEL)
    weights = {"module.model.weight": torch.rand(4, 3, 1, 1), "module.model.bias": torch.rand(4)}
    torch.save(weights, tmp_path / "w.pt")
    result = repconv_cli.inspect(tmp_path / "w.pt", arch=f"{tmp_path / 'arch.py'}:make", input=(1, 3, 5, 5))
    told = " ".join(result.source.notes)
    assert "the architecture's own names begin with 'model.', which therefore stayed" in told


PLAIN = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""


def plain(tmp_path: Path) -> tuple[str, nn.Module]:
    (tmp_path / "arch.py").write_text(PLAIN)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    module[1].running_mean.normal_()
    return f"{tmp_path / 'arch.py'}:make", module


def assert_same(module: nn.Module, path: Path) -> None:
    x = torch.rand(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(repconv_cli.load(path)(x), module(x))


def test_counters_of_batches_need_not_be_there(tmp_path: Path) -> None:
    arch, module = plain(tmp_path)
    weights = {key: value for key, value in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "w.pt")
    repconv_cli.fuse(tmp_path / "w.pt", tmp_path / "o.safetensors", arch=arch, input=(1, 3, 5, 5))
    assert_same(module, tmp_path / "o.safetensors")


@pytest.mark.parametrize("prefix", ["net.", "model.backbone."])
@pytest.mark.parametrize("counters", [True, False])
def test_a_model_beside_other_tensors_is_found_by_its_names(tmp_path: Path, prefix: str, counters: bool) -> None:
    arch, module = plain(tmp_path)
    weights = {prefix + key: value for key, value in module.state_dict().items() if counters or "batches" not in key}
    weights |= {"loss.weight": torch.ones(2), "metric.total": torch.tensor(3)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.ckpt")
    result = repconv_cli.fuse(tmp_path / "w.ckpt", tmp_path / "o.safetensors", arch=arch, input=(1, 3, 5, 5))
    told = f"the weights are those under {prefix!r}; 2 others were left out (loss.weight, metric.total)"
    assert told in result.source.notes
    assert_same(module, tmp_path / "o.safetensors")


def test_of_two_models_in_one_file_none_is_taken(tmp_path: Path) -> None:
    arch, module = plain(tmp_path)
    weights = {part + key: value for part in ("student.", "teacher.") for key, value in module.state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"missing .* unexpected .*student\."):
        repconv_cli.fuse(tmp_path / "w.pt", tmp_path / "o.safetensors", arch=arch, input=(1, 3, 5, 5))


def test_what_is_under_the_prefix_and_has_no_place_is_told(tmp_path: Path) -> None:
    arch, module = plain(tmp_path)
    weights = {f"net.{key}": value for key, value in module.state_dict().items()} | {"net.head.bias": torch.ones(3)}
    torch.save(weights | {"loss.weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"architecture: 1 unexpected \(head\.bias\)"):
        repconv_cli.fuse(tmp_path / "w.pt", tmp_path / "o.safetensors", arch=arch, input=(1, 3, 5, 5))
