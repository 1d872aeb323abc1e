"""The Python functions, on live modules: the caller's module stays as it was, and what is loaded is a real module."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repconv_cli
from repconv_cli import api
from repconv_cli.errors import InputError, OutputError
from repconv_cli.results import Result

SHAPE = (1, 3, 7, 8)


class TwoTowers(nn.Module):
    """A class of the user's own: two inputs, a dict out; each tower a 3x3 and a 1x1, normed, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.left_norm = nn.BatchNorm2d(4)
        self.right = nn.Conv2d(2, 4, 1)
        self.right_norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        features = (self.left_norm(self.left(image)) + self.right_norm(self.right(depth))).relu()
        return {"logits": self.head(self.drop(features.mean((2, 3)))), "features": features}


TWO_SHAPES = ((1, 3, 7, 8), (1, 2, 7, 8))


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
            part.running_var.uniform_(0.5, 2).view(-1)[0] = 1e-4  # type: ignore[union-attr, operator]
    return model


@pytest.fixture(scope="module")
def towers() -> TwoTowers:
    model = TwoTowers()
    randomised(model)
    # In training mode, but for one part: each flag has to come back.
    model.train()
    model.left_norm.eval()
    return model


@pytest.fixture(scope="module")
def state_before(towers: TwoTowers) -> tuple[dict[str, Tensor], list[bool]]:
    return copy.deepcopy(towers.state_dict()), [part.training for part in towers.modules()]


@pytest.fixture(scope="module")
def out(towers: TwoTowers, state_before: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    del state_before
    path = tmp_path_factory.mktemp("api") / "towers.safetensors"
    result = api.fuse(towers, path, input=TWO_SHAPES)
    assert result.output is not None
    assert result.output.path == str(path)
    return path


def test_every_name_of_the_package_is_its_function_however_it_was_imported() -> None:
    importlib.import_module("repconv_cli.convert")
    for name in ("fuse", "inspect", "load", "verify"):
        assert getattr(repconv_cli, name) is getattr(api, name), f"{name} is {getattr(repconv_cli, name)}"


def test_inspect_tells_what_can_be_fused_on_a_live_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    found = api.inspect(model, input=SHAPE)
    assert isinstance(found, Result)
    assert [block.name for block in found.blocks] == ["0"]
    assert found.totals is not None
    assert (found.totals.norms.before, found.totals.norms.after) == (1, 0)
    assert found.input.examples == ((2, 3, 7, 8),)
    assert (found.output, found.verification) == (None, None)


def test_a_module_of_the_users_own_with_two_inputs_and_a_dict_out(towers: TwoTowers, out: Path) -> None:
    image, depth = torch.randn(3, 3, 7, 8), torch.randn(3, 2, 7, 8)
    with torch.no_grad():
        expected = copy.deepcopy(towers).eval()(image, depth)
        found = api.load(out)(image, depth)
    assert list(found) == ["logits", "features"]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    assert {"left_norm.weight", "right_norm.weight"}.isdisjoint(load_file(out))


def test_the_callers_module_is_unchanged(
    towers: TwoTowers, out: Path, state_before: tuple[dict[str, Tensor], list[bool]]
) -> None:
    result = api.verify(towers, out, input=TWO_SHAPES)
    assert result.verification
    api.inspect(towers, input=TWO_SHAPES)
    tensors, flags = state_before
    assert [part.training for part in towers.modules()] == flags
    assert list(towers.state_dict()) == list(tensors)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in towers.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in towers.parameters())
    assert "the module was given in training mode" in " ".join(result.source.notes)


def test_what_is_loaded_has_the_files_keys_and_tensors(out: Path) -> None:
    state, stored = api.load(out).state_dict(), load_file(out)
    assert set(state) == set(stored)
    assert all(torch.equal(state[key], stored[key]) for key in stored)
    assert not api.load(out).training


def test_gradients_flow_through_what_is_loaded(out: Path) -> None:
    model = api.load(out)
    image = torch.randn(2, 3, 7, 8, requires_grad=True)
    model(image, torch.randn(2, 2, 7, 8))["logits"].square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert len(list(model.parameters())) == len(load_file(out))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_what_is_loaded_moves_to_float64(out: Path) -> None:
    single, double = api.load(out), api.load(out).to(torch.float64)
    image, depth = torch.randn(2, 3, 7, 8), torch.randn(2, 2, 7, 8)
    with torch.no_grad():
        found = double(image.double(), depth.double())["logits"]
        assert found.dtype == torch.float64
        torch.testing.assert_close(single(image, depth)["logits"].double(), found, rtol=1e-4, atol=1e-4)


def test_torch_exports_what_is_loaded(out: Path) -> None:
    model, args = api.load(out), (torch.randn(2, 3, 7, 8), torch.randn(2, 2, 7, 8))
    program = torch.export.export(model, args, strict=False)
    assert set(program.state_dict) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(program.module()(*args)["logits"], model(*args)["logits"])


def test_torch_traces_and_compiles_what_is_loaded(out: Path) -> None:
    model, args = api.load(out), (torch.randn(2, 3, 7, 8), torch.randn(2, 2, 7, 8))
    with torch.no_grad():
        expected = model(*args)["logits"]
        traced = torch.jit.trace(model, args, strict=False)
        torch.testing.assert_close(traced(*args)["logits"], expected)
        # No C++ compiler is needed to see that torch can capture it whole.
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args)["logits"], expected)


def test_what_is_loaded_moves_to_another_device(out: Path) -> None:
    model = api.load(out).to("meta")
    found = model(torch.randn(2, 3, 7, 8, device="meta"), torch.randn(2, 2, 7, 8, device="meta"))["logits"]
    assert found.device.type == "meta"


def test_what_is_loaded_learns(out: Path) -> None:
    torch.manual_seed(0)
    model, args = api.load(out).train(), (torch.randn(2, 3, 7, 8), torch.randn(2, 2, 7, 8))
    # Steps of a size that does not depend on that of the gradients: the weights are drawn, and may be large.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(*args)["logits"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_copy_of_what_is_loaded_is_a_model_of_its_own(out: Path) -> None:
    model, args = api.load(out), (torch.randn(2, 3, 7, 8), torch.randn(2, 2, 7, 8))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(*args)["logits"]
        assert torch.equal(twin(*args)["logits"], expected)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(*args)["logits"].any()
        assert torch.equal(model(*args)["logits"], expected)


def test_loading_never_unpickles(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load")):
        monkeypatch.setattr(sys.modules[module], name, refuse)
    assert len(api.load(out).state_dict()) > 0


def test_any_batch_and_size_that_the_model_takes(out: Path) -> None:
    with torch.no_grad():
        for batch, height, width in ((1, 7, 8), (5, 3, 11)):
            found = api.load(out)(torch.randn(batch, 3, height, width), torch.randn(batch, 2, height, width))
            assert found["features"].shape == (batch, 4, height, width)


def test_a_model_whose_keys_all_have_one_prefix_is_loaded_with_its_keys(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("model", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    api.fuse(model.eval(), tmp_path / "out.safetensors", input=SHAPE)
    assert set(api.load(tmp_path / "out.safetensors").state_dict()) == {"model.0.weight", "model.0.bias"}


def test_wrong_calls_are_told(towers: TwoTowers, out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"called with 1 by place; needed: \(image, depth\)"):
        api.load(out)(torch.randn(2, 3, 7, 8))
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        api.fuse(towers, out, input=TWO_SHAPES)
    with pytest.raises(InputError, match=r"no such file"):
        api.load(tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="unexpected keyword argument 'shape'"):
        api.inspect(towers, shape=SHAPE)


@pytest.mark.parametrize("shape", [(2, 3, -1, 9), (2, 3, 0, 9), ((),), (2.0, 3, 8, 8), "2,3,8,8", (True, 3, 8, 8), 7])
def test_what_is_no_shape_is_told(shape: object) -> None:
    with pytest.raises(InputError, match="input=") as caught:
        repconv_cli.inspect(nn.Conv2d(3, 4, 3), input=shape)
    assert "(1, 3, 224, 224)" in str(caught.value)


def test_a_weights_file_that_is_not_ours_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt: it holds no graph"):
        api.load(tmp_path / "weights.pt")
