"""``fuse`` into ONNX and into a torch.export program: run where they will run, against the original module."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import repconv_cli
from repconv_cli.errors import InputError, OutputError
from repconv_cli.onnx import library


class Branches(nn.Module):
    """Two branches and an identity, with statistics that hide nothing; gives a dict, as real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.point = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.norm, self.identity = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for norm in (self.norm, self.identity):
                norm.weight.copy_(torch.randn(4, generator=generator))
                norm.bias.copy_(torch.randn(4, generator=generator))
                norm.running_mean.copy_(torch.randn(4, generator=generator))
                norm.running_var.copy_(torch.tensor([0.5, 1.0, 2.0, 1e-3]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.norm(self.dense(x)) + self.point(x) + self.identity(x))
        return {"features": y, "scores": self.head(y.mean((2, 3)))}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Branches().eval()


SHAPE = (2, 4, 9, 8)


@pytest.fixture(scope="module")
def as_onnx(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs") / "out.onnx"
    result = repconv_cli.fuse(module, path, input=SHAPE)
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    return path


class Keyword(nn.Module):
    """Called by a keyword, and of a stride: torch keeps conditions on its sizes, named by that keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 3, 2, 1)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"features": self.last(torch.relu(self.norm(self.stem(pixel_values))))}


class Three(nn.Module):
    """Three inputs of one batch, laid together: torch writes that as a multiple of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        flat = [part(v).reshape(-1, 4) for part, v in zip(self.parts, (x, y, z), strict=True)]
        return (flat[0] + flat[1] * flat[2]).reshape(-1, 64)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (Keyword(), {"pixel_values": (2, 3, 32, 32)}),
        (Three(), dict.fromkeys("xyz", (2, 4, 4, 4))),
    ],
    ids=["keyword", "three"],
)
def test_a_fused_file_becomes_onnx_with_its_sizes_free(
    module: nn.Module, call: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    module.eval()
    values = {name: torch.randn(shape) for name, shape in call.items()}
    repconv_cli.fuse(module, tmp_path / "a.safetensors", args=(), kwargs=values)
    result = repconv_cli.fuse(tmp_path / "a.safetensors", tmp_path / "a.onnx")
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert all(isinstance(info.shape[0], str) for info in session.get_inputs())
    values = {name: torch.randn(3, *shape[1:]) for name, shape in call.items()}
    feed = {info.name: value.numpy() for info, value in zip(session.get_inputs(), values.values(), strict=True)}
    (found,) = session.run(None, feed)
    expected = module(**values)
    expected = expected if isinstance(expected, Tensor) else expected["features"]
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, (1, 4, 9, 8), (3, 4, 12, 7)])
def test_the_onnx_file_gives_what_the_module_gives_at_free_sizes(
    shape: tuple[int, ...], module: nn.Module, as_onnx: Path
) -> None:
    session = onnxruntime.InferenceSession(str(as_onnx), providers=["CPUExecutionProvider"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for expected, value in zip(module(x).values(), found, strict=True):
        scale = float(expected.detach().abs().max())
        np.testing.assert_allclose(value, expected.detach().numpy(), atol=1e-5 * scale, rtol=0)


def test_the_onnx_file_is_fused_checked_and_tells_its_verification(as_onnx: Path) -> None:
    model = onnx.load(as_onnx)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 1
    assert "BatchNormalization" not in kinds
    texts = {entry.key: entry.value for entry in model.metadata_props}
    assert texts["repconv.version"] == repconv_cli.__version__
    assert '"verdict": "pass"' in texts["repconv.verification"]
    assert os.listdir(as_onnx.parent) == ["out.onnx"]


def test_verify_judges_the_onnx_file_in_onnxruntime(module: nn.Module, as_onnx: Path, tmp_path: Path) -> None:
    verification = repconv_cli.verify(module, as_onnx, input=SHAPE).verification
    assert verification is not None
    assert verification.verdict == "pass"
    assert verification.tensors_checked >= 2
    model = onnx.load(as_onnx)
    tensor = next(t for t in model.graph.initializer if t.name == "dense.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(model.SerializeToString())
    verification = repconv_cli.verify(module, wrong, input=SHAPE).verification
    assert verification is not None
    assert verification.verdict == "fail"
    assert verification.looks_like == "dense.weight is 1.01 times what it should be"


def test_the_program_file_gives_what_the_module_gives_and_is_a_source(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "out.pt2"
    result = repconv_cli.fuse(module, path, input=SHAPE)
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    verification = repconv_cli.verify(module, path, input=SHAPE).verification
    assert verification is not None
    assert verification.verdict == "pass"
    assert verification.tensors_checked == 4
    loaded = torch.export.load(path).module()
    x = torch.randn(3, 4, 10, 7, generator=torch.Generator().manual_seed(1))
    for name, expected in module(x).items():
        torch.testing.assert_close(loaded(x)[name], expected, atol=1e-5, rtol=1e-4)
    assert not repconv_cli.inspect(path).blocks


class Attention(nn.Module):
    """Attention with leading axes ``heads``; torch's ONNX exporter by itself takes two of them, no more, no less."""

    def __init__(self, heads: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
        super().__init__()
        self.heads, self.query = heads, nn.Linear(8, 8)
        generator = torch.Generator().manual_seed(0)
        self.mask = None if mask is None else nn.Parameter(torch.randn(mask, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, *self.heads, 6, 8)
        return nn.functional.scaled_dot_product_attention(self.query(x), x, 2 * x, self.mask)


@pytest.mark.parametrize(
    ("heads", "mask"), [((), None), ((2,), (6, 6)), ((3, 2), None), ((3, 2), (3, 1, 6, 6)), ((2, 1, 3), (6, 6))]
)
def test_attention_of_any_number_of_axes_goes_to_onnx(
    heads: tuple[int, ...], mask: tuple[int, ...] | None, tmp_path: Path
) -> None:
    module, path = Attention(heads, mask).eval(), tmp_path / "out.onnx"
    x = torch.randn(math.prod(heads) * 4, 6, 8, generator=torch.Generator().manual_seed(1))
    repconv_cli.fuse(module, path, args=(x,))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), atol=1e-6, rtol=1e-5)


def test_what_the_exporter_cannot_take_is_told_by_its_first_cause(tmp_path: Path) -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(OutputError, match=r"torch's exporter makes no ONNX of it: .*bessel_j0"):
        repconv_cli.fuse(Foreign(), tmp_path / "out.onnx", input=SHAPE)


def test_the_causes_of_an_error_end(tmp_path: Path) -> None:
    """An error that is given its place on the way up stays what was raised: it is not its own cause."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(7, 11)

    with pytest.raises(InputError) as caught:
        repconv_cli.fuse(Broken().eval(), tmp_path / "a.safetensors", input=SHAPE)
    chain: list[BaseException] = [caught.value]
    while (cause := chain[-1].__cause__) is not None:
        assert cause not in chain
        chain.append(cause)
    assert len(chain) > 1


def test_a_dry_run_and_an_existing_file_write_nothing(module: nn.Module, tmp_path: Path) -> None:
    for suffix in ("onnx", "pt2"):
        repconv_cli.fuse(module, tmp_path / f"out.{suffix}", input=SHAPE, dry_run=True)
        assert os.listdir(tmp_path) == []


def test_without_the_libraries_an_onnx_output_is_refused_before_any_work(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'repconv-cli\[onnx\]'"):
        repconv_cli.fuse(module, tmp_path / "out.onnx", input=SHAPE)


class Scaled(nn.Module):
    """One tensor in and one out, so that every format can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.branches(x)["features"]


SUFFIXES = (".safetensors", ".pt2", ".onnx")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | nn.Module]:
    """One model in each form that holds its graph, fused and not."""
    folder = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    model = Scaled().eval()
    torch.export.save(torch.export.export(model, (torch.zeros(SHAPE),)), folder / "unfused.pt2")
    exported = torch.onnx.export(model, (torch.zeros(SHAPE),), dynamo=True, verbose=False)
    assert exported is not None
    exported.save(folder / "unfused.onnx")
    for suffix in SUFFIXES:
        repconv_cli.fuse(model, folder / f"fused{suffix}", input=SHAPE)
    names = ("unfused.pt2", "unfused.onnx", *(f"fused{suffix}" for suffix in SUFFIXES))
    return {"module": model, **{name: folder / name for name in names}}


SOURCES = ("module", "unfused.pt2", "unfused.onnx", "fused.safetensors", "fused.pt2", "fused.onnx")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SOURCES)
def test_any_source_is_a_judge_of_any_output(
    name: str, suffix: str, sources: dict[str, Path | nn.Module], tmp_path: Path
) -> None:
    given = SHAPE if name == "module" else ()
    right = sources[f"fused{suffix}"]
    assert isinstance(right, Path)
    verification = repconv_cli.verify(sources[name], right, input=given).verification
    assert verification is not None
    # Where graph or tensors cannot be compared with a new plan, the outputs are, and that is said.
    assert verification.verdict == "pass" or (verification.verdict == "partial" and verification.not_checked)
    assert verification.max_abs is not None
    torch.manual_seed(0)
    other = Scaled().eval()
    with torch.no_grad():
        other.branches.dense.weight[1] *= 1.01
    wrong = tmp_path / f"wrong{suffix}"
    repconv_cli.fuse(other, wrong, input=SHAPE)
    verification = repconv_cli.verify(sources[name], wrong, input=given).verification
    assert verification is not None
    assert verification.verdict == "fail"
