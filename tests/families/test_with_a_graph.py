"""``--target deploy`` with the architecture: the same tensors as from the weights alone, proven on the whole graph."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repconv_cli import convert, load
from repconv_cli.errors import InputError
from repconv_cli.options import Options
from tests.families.reference import CASES, Case, MobileOne, RepVGG, assert_equal_outputs, drawn, named

every_case = pytest.mark.parametrize("case", CASES, ids=[case.family for case in CASES])


def both_ways(model: nn.Module, channels: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "w.safetensors")
    convert.fuse(folder / "w.safetensors", folder / "alone.safetensors", Options())
    options = Options(target="deploy", input=((2, channels, 12, 11),), samples=1)
    result = convert.fuse(model, folder / "graph.safetensors", options)
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    return load_file(folder / "alone.safetensors"), load_file(folder / "graph.safetensors")


@every_case
def test_weights_alone_and_weights_with_a_graph_give_the_same_tensors(case: Case, tmp_path: Path) -> None:
    model = drawn(case.training(), case.eps)
    alone, graph = both_ways(model, case.channels, tmp_path)
    assert alone.keys() == graph.keys()
    assert all(torch.equal(alone[key], graph[key]) for key in alone)


def test_the_file_of_a_known_graph_runs_and_is_verified_whole(tmp_path: Path) -> None:
    case = CASES[0]
    model = drawn(case.training(), case.eps)
    options = Options(target="deploy", input=((2, case.channels, 12, 11),), samples=1)
    out = tmp_path / "deploy.safetensors"
    result = convert.fuse(model, out, options)
    assert [block.target for block in result.blocks] == [f"stage{i}.rbr_reparam.weight" for i in range(3)]
    assert [block.kind for block in result.blocks] == ["3×3 + 1×1 + identity", "3×3 + 1×1", "3×3 + 1×1 + identity"]
    assert_equal_outputs(model, load(out), case.channels)
    verified = convert.verify(model, out, options).verification
    assert verified is not None
    assert (verified.verdict, verified.tensors_checked) == ("pass", 6)
    tensors = load_file(out)
    tensors["stage1.rbr_reparam.bias"][2] += 1
    with safe_open(out, "pt") as file:
        save_file(tensors, tmp_path / "wrong.safetensors", file.metadata())
    wrong = convert.verify(model, tmp_path / "wrong.safetensors", options).verification
    assert wrong is not None
    assert (wrong.verdict, wrong.first_bad_block) == ("fail", "stage1")


def test_each_norm_has_the_eps_that_the_graph_says(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), b=RepVGG(4, 4)), 1e-5)
    for number, part in enumerate(part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
        part.eps = 10.0 ** -(number % 4 + 1)
    out = tmp_path / "deploy.safetensors"
    convert.fuse(model, out, Options(target="deploy", input=((2, 4, 9, 8),), samples=1))
    assert_equal_outputs(model, load(out), 4)


def test_what_the_deploy_class_keeps_is_kept_though_it_could_be_fused(tmp_path: Path) -> None:
    model = drawn(named(a=MobileOne(4, 4), norm=nn.BatchNorm2d(4), act=nn.ReLU()), 1e-5)
    options = Options(target="deploy", input=((2, 4, 9, 8),), samples=1)
    result = convert.fuse(model, tmp_path / "deploy.safetensors", options)
    assert len(result.blocks) == 1
    found = load_file(tmp_path / "deploy.safetensors")
    assert set(found) == {"a.reparam_conv.weight", "a.reparam_conv.bias"} | {
        f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    full = convert.fuse(model, tmp_path / "full.safetensors", Options(input=((2, 4, 9, 8),), samples=1))
    assert full.totals is not None
    assert full.totals.norms.after == 0


class Twice(nn.Module):
    """One block called on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = RepVGG(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).relu() + self.block(x.flip(-1)).tanh()


def test_a_block_that_is_called_twice_is_fused_in_both_places(tmp_path: Path) -> None:
    model = drawn(Twice(), 1e-5)
    alone, graph = both_ways(model, 4, tmp_path)
    assert alone.keys() == graph.keys() == {"block.rbr_reparam.weight", "block.rbr_reparam.bias"}
    assert_equal_outputs(model, load(tmp_path / "graph.safetensors"), 4)


class Other(RepVGG):
    """A block with RepVGG's names that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rbr_dense(x) - self.rbr_1x1(x) + self.rbr_identity(x)


def test_a_block_that_only_has_the_familys_names_is_refused(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), b=Other(4, 4)), 1e-5)
    options = Options(target="deploy", input=((2, 4, 9, 8),), samples=1)
    with pytest.raises(InputError, match=r"block b has the names of RepVGG, and is not computed like it.*target full"):
        convert.fuse(model, tmp_path / "deploy.safetensors", options)
    assert not (tmp_path / "deploy.safetensors").exists()
    full = convert.fuse(model, tmp_path / "full.safetensors", Options(input=((2, 4, 9, 8),), samples=1))
    assert len(full.blocks) == 2


def test_inspect_with_the_deploy_target_promises_what_fuse_delivers(tmp_path: Path) -> None:
    model = drawn(named(a=MobileOne(4, 4), norm=nn.BatchNorm2d(4), act=nn.ReLU()), 1e-5)
    options = Options(target="deploy", input=((2, 4, 9, 8),), samples=1)
    promised = convert.inspect(model, options)
    delivered = convert.fuse(copy.deepcopy(model), tmp_path / "deploy.safetensors", options)
    assert promised.totals == delivered.totals
    assert [block.name for block in promised.blocks] == [block.name for block in delivered.blocks]


def test_a_program_file_gives_the_deploy_class_what_its_weights_alone_give(tmp_path: Path) -> None:
    case = CASES[0]
    model = drawn(case.training(), case.eps)
    x = torch.randn(2, case.channels, 12, 11)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    options = Options(target="deploy", samples=1)
    result = convert.fuse(tmp_path / "model.pt2", tmp_path / "program.safetensors", options)
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "w.safetensors")
    convert.fuse(tmp_path / "w.safetensors", tmp_path / "alone.safetensors", Options())
    program, alone = load_file(tmp_path / "program.safetensors"), load_file(tmp_path / "alone.safetensors")
    assert program.keys() == alone.keys()
    assert all(torch.equal(program[key], alone[key]) for key in alone)
    deploy = case.deploy()
    deploy.load_state_dict(program, strict=True)
    assert_equal_outputs(model, deploy, case.channels)


def test_the_deploy_form_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    model = drawn(named(a=MobileOne(4, 4), norm=nn.BatchNorm2d(4), act=nn.ReLU()), 1e-5)
    options = Options(target="deploy", input=((2, 4, 9, 8),), samples=1, draw=True)
    made = tmp_path / "deploy.safetensors"
    for result in (
        convert.inspect(model, options),
        convert.fuse(model, made, options),
        convert.verify(model, made, options),
    ):
        assert result.drawing is not None
        (picture,) = result.drawing.pictures
        assert not picture.note
        assert len(picture.branches) > 1
        after = [node.op for node in result.drawing.after]
        assert len(after) < len(result.drawing.before)
        # The deploy class keeps this norm.
        assert sum("norm" in op for op in after) == 1


def test_a_block_that_is_called_twice_is_drawn(tmp_path: Path) -> None:
    options = Options(target="deploy", input=((2, 4, 9, 8),), samples=1, draw=True)
    result = convert.fuse(drawn(Twice(), 1e-5), tmp_path / "deploy.safetensors", options)
    assert result.drawing is not None
    assert len(result.drawing.pictures) == len(result.blocks)


def test_weights_alone_have_a_picture_of_each_block_and_no_graph(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), b=RepVGG(4, 4)), 1e-5)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    result = convert.fuse(tmp_path / "weights.safetensors", tmp_path / "out.safetensors", Options(draw=True))
    assert result.drawing is not None
    assert (result.drawing.before, result.drawing.after) == ((), ())
    fused = load_file(tmp_path / "out.safetensors")
    for picture, block in zip(result.drawing.pictures, result.blocks, strict=True):
        assert picture.fused is not None
        o, i = picture.pairs[0]
        expected = fused[f"{block.name}.rbr_reparam.weight"][o, i].flatten()
        torch.testing.assert_close(torch.tensor(picture.fused.slices[0]), expected, rtol=1e-3, atol=1e-3)
