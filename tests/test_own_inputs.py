"""The user's own inputs: traced with, compared on, named as ``forward`` names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import repconv_cli
from repconv_cli.errors import InputError
from tests.cli.runs import run


class Detector(nn.Module):
    """Takes a dict of images and ids by keyword, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.embed = nn.Embedding(5, 4)

    def forward(self, pixels: Tensor, ids: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.norm(self.conv(pixels)) + self.embed(ids)[:, :, None, None]
        return {"features": torch.relu(y if mask is None else y * mask), "ids": ids}


def model() -> nn.Module:
    torch.manual_seed(0)
    module = Detector().eval()
    with torch.no_grad():
        for parameter in (*module.norm.parameters(), module.norm.running_mean):
            parameter.uniform_(-1, 2)
        module.norm.running_var.uniform_(0.1, 2)
    return module


def call(batch: int) -> dict[str, Tensor]:
    return {"pixels": torch.randn(batch, 3, 6, 6), "ids": torch.full((batch,), 4), "mask": torch.rand(batch, 1, 6, 6)}


@pytest.mark.parametrize("batch", [1, 3])
def test_keywords_and_dicts_go_through_and_come_back(tmp_path: Path, batch: int) -> None:
    module = model()
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors", kwargs=call(batch))
    assert result.verification.passed
    assert (result.totals.norms.before, result.totals.norms.after) == (1, 0)
    again = repconv_cli.verify(module, tmp_path / "out.safetensors", kwargs=call(batch))
    assert again.verification.verdict == "pass"
    loaded, other = repconv_cli.load(tmp_path / "out.safetensors"), call(5)
    found, expected = loaded(**other), module(**other)
    assert set(found) == {"features", "ids"}
    torch.testing.assert_close(found["features"], expected["features"])


def test_the_comparison_is_made_on_the_users_values():
    """Ids of 4 are only among the user's own: noise for whole numbers is 0 and 1."""
    seen = []

    class Spy(Detector):
        def forward(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            if not torch.compiler.is_compiling() and type(ids) is Tensor:
                seen.append(ids.clone())
            return super().forward(pixels, ids)

    own = call(2)
    repconv_cli.inspect(Spy(), kwargs={name: own[name] for name in ("pixels", "ids")})
    from repconv_cli.convert import compare_outputs, fuse_traced
    from repconv_cli.graph.program import ProgramModule
    from repconv_cli.opening import open_source, trace_source
    from repconv_cli.options import Options

    options = Options(example=((own["pixels"], own["ids"]), {}))
    opened = open_source(Spy().eval(), options)
    program, is_guessed = trace_source(opened, options)
    fused = fuse_traced(program, options, None).program
    seen.clear()
    assert compare_outputs(program, opened.module, fused, ProgramModule(fused), options)
    assert not is_guessed
    assert len(seen) == 1
    assert torch.equal(seen[0], own["ids"])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_file_of_named_inputs(tmp_path: Path, suffix: str) -> None:
    torch.save(model(), tmp_path / "unused.pt")
    (tmp_path / "arch.py").write_text(
        "from tests.test_own_inputs import model\n\ndef make():\n    return model()\n", encoding="utf-8"
    )
    save_file(model().state_dict(), tmp_path / "weights.safetensors")
    path = tmp_path / f"data.{suffix}"
    if suffix == "npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in call(2).items()})
    else:
        save_file(call(2), path)
    done = run(
        "fuse", tmp_path / "weights.safetensors", tmp_path / "out.safetensors", "--arch", f"{tmp_path}/arch.py:make",
        "--inputs", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "guessed" not in done.output


def refused(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=reason):
        repconv_cli.inspect(model(), inputs=tmp_path / "data.npz")


def test_names_that_the_model_does_not_take_are_told(tmp_path: Path) -> None:
    refused(
        tmp_path, {"image": np.zeros((1, 3, 6, 6))}, r"it holds image, which is no input of the model; needed: names"
    )


def test_arrays_of_objects_are_never_unpickled(tmp_path: Path) -> None:
    refused(tmp_path, {"pixels": np.array([{}], dtype=object)}, r"it cannot be read as \.npz arrays of numbers")


def test_inputs_without_names_go_by_their_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", np.zeros((2, 3, 6, 6), np.float32), np.ones(2, np.int64))
    assert repconv_cli.inspect(model(), inputs=tmp_path / "data.npz").input.examples == ((2, 3, 6, 6), (2,))


def test_an_example_that_is_no_tensor_is_told():
    with pytest.raises(InputError, match="an example input is a float; needed: tensors"):
        repconv_cli.inspect(model(), args=(0.5,))


class OneSize(nn.Module):
    """Takes batches of the size that it saw last as its own, as heads with anchors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (0.0 if x.shape[0] == 2 else 1.0)


@pytest.mark.parametrize(("asked", "batch"), [((1, 3, 6, 6), 1), ((2, 3, 6, 6), 2), ((5, 3, 6, 6), 5)])
def test_where_the_batch_cannot_be_free_it_is_the_one_that_was_asked_for(
    tmp_path: Path, asked: tuple[int, ...], batch: int
) -> None:
    module = OneSize().eval()
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors", input=asked)
    assert result.input.shapes[0][0] == batch
    x = torch.randn(batch, 3, 6, 6)
    torch.testing.assert_close(repconv_cli.load(tmp_path / "out.safetensors")(x), module(x))


def test_a_model_that_tells_one_sample_from_more_is_fused_for_one(tmp_path: Path) -> None:
    class Single(OneSize):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + (0.0 if x.shape[0] == 1 else 1.0)

    module = Single().eval()
    result = repconv_cli.fuse(module, tmp_path / "out.safetensors")
    assert result.input.shapes[0][0] == 1
    assert any("one sample" in note for note in result.notes), result.notes
    x = torch.randn(result.input.examples[0])
    torch.testing.assert_close(repconv_cli.load(tmp_path / "out.safetensors")(x), module(x))


def test_without_a_shape_a_fixed_batch_is_one_sample():
    assert repconv_cli.inspect(OneSize()).input.shapes[0][0] == 1
