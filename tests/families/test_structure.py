"""Training form, deploy form and half of each are told apart by structure; what is broken is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import Result as Run

from repconv_cli import convert
from repconv_cli.errors import DamagedFileError, InputError
from repconv_cli.options import Options
from tests.cli.runs import run
from tests.families.reference import CASES, QARepVGG, RepVGG, conv_bn, drawn, named


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_a_half_fused_file_is_finished(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), b=RepVGG(4, 4)), 1e-5)
    convert.fuse(write(tmp_path / "all.safetensors", model.state_dict()), tmp_path / "fused.safetensors", Options())
    whole = load_file(tmp_path / "fused.safetensors")
    half = {k: v for k, v in model.state_dict().items() if k.startswith("b.")}
    half |= {key: tensor for key, tensor in whole.items() if key.startswith("a.")}
    result = convert.fuse(write(tmp_path / "half.safetensors", half), tmp_path / "out.safetensors", Options())
    assert [block.name for block in result.blocks] == ["b"]
    assert "half fused: 1 blocks were in deploy form already and stay as they are" in result.notes
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_an_unused_deploy_tensor_beside_the_branches_is_replaced(tmp_path: Path) -> None:
    model = drawn(named(a=QARepVGG(4, 4)), 1e-5)
    source = write(tmp_path / "weights.safetensors", model.state_dict())
    assert "a.rbr_reparam.weight" in model.state_dict()
    result = convert.fuse(source, tmp_path / "out.safetensors", Options())
    assert any("2 tensors lay unused under a deploy key" in note for note in result.notes)
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {"a.rbr_reparam.weight", "a.rbr_reparam.bias"}
    assert not torch.equal(found["a.rbr_reparam.weight"], model.state_dict()["a.rbr_reparam.weight"])


def test_keys_of_no_block_pass_through_unchanged(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), head=nn.Linear(4, 3), norm=nn.BatchNorm2d(4)), 1e-5)
    convert.fuse(write(tmp_path / "w.safetensors", model.state_dict()), tmp_path / "out.safetensors", Options())
    found, before = load_file(tmp_path / "out.safetensors"), model.state_dict()
    kept = {key for key in before if key.startswith(("head.", "norm."))}
    assert kept <= set(found)
    assert "norm.num_batches_tracked" in kept
    assert all(torch.equal(found[key], before[key]) for key in kept)


def test_tied_and_strided_tensors_come_out_right(tmp_path: Path) -> None:
    model = drawn(named(a=RepVGG(4, 4), b=RepVGG(4, 4)), 1e-5)
    tensors = dict(model.state_dict())
    tensors["a.rbr_dense.conv.weight"] = tensors["b.rbr_dense.conv.weight"]
    tensors["a.rbr_1x1.conv.weight"] = tensors["a.rbr_1x1.conv.weight"].permute(1, 0, 2, 3)
    torch.save(tensors, tmp_path / "tied.pt")
    convert.fuse(tmp_path / "tied.pt", tmp_path / "a.safetensors", Options())
    write(tmp_path / "plain.safetensors", {key: tensor.clone() for key, tensor in tensors.items()})
    convert.fuse(tmp_path / "plain.safetensors", tmp_path / "b.safetensors", Options())
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_prefix_that_is_part_of_the_model_is_put_back(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.family.startswith("YOLO ("))
    model = nn.Module()
    model.model = drawn(case.training(), case.eps)
    result = convert.fuse(write(tmp_path / "w.safetensors", model.state_dict()), tmp_path / "o.safetensors", Options())
    deploy = nn.Module()
    deploy.model = case.deploy()
    deploy.load_state_dict(load_file(tmp_path / "o.safetensors"), strict=True)
    verified = convert.verify(tmp_path / "w.safetensors", tmp_path / "o.safetensors", Options()).verification
    assert verified is not None
    assert verified.verdict == "partial"
    assert any("put 'model.' back" in note for note in result.source.notes)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("a.rbr_1x1.bn.running_var"), r"looks like RepVGG and lacks a\.rbr_1x1\.bn\.running_var"),
        (lambda t: t.pop("a.rbr_1x1.conv.weight"), r"block a looks like RepVGG and lacks a\.rbr_1x1\.conv\.weight"),
        (lambda t: t.update({"a.rbr_1x1.conv.weight": torch.ones(4, 3, 1, 1)}), r"has shape \(4, 3, 1, 1\)"),
        (lambda t: t.update({"a.rbr_1x1.bn.bias": torch.ones(5)}), r"bn\.bias has shape \(5,\), needed \(4,\)"),
        (lambda t: t.update({"a.rbr_1x1.conv.weight": torch.ones(4, 4, 2, 2)}), r"3×3 and 2×2 have no common middle"),
        (lambda t: t.update({"a.rbr_1x1.conv.weight": torch.ones(4, 4, 5, 5)}), r"5×5 is larger than the block's"),
        (lambda t: t.update({"a.rbr_1x1.conv.weight": torch.ones(6, 4, 1, 1)}), r"shape \(4,\), needed \(6,\)"),
    ],
)  # fmt: skip
def test_a_broken_block_is_refused_with_the_reason(change: Change, reason: str, tmp_path: Path) -> None:
    tensors = dict(drawn(named(a=RepVGG(4, 4)), 1e-5).state_dict())
    change(tensors)
    source = write(tmp_path / "broken.safetensors", tensors)
    with pytest.raises(DamagedFileError, match=reason):
        convert.fuse(source, tmp_path / "out.safetensors", Options())
    assert not (tmp_path / "out.safetensors").exists()


def refused(source: Path, *options: str) -> Run:
    out = source.parent / "out.safetensors"
    done = run("fuse", source, out, *options)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert not out.exists()
    return done


def test_an_unknown_file_gets_what_was_seen_the_nearest_family_and_what_to_do(tmp_path: Path) -> None:
    tensors = {f"rbr_dense.{i}.convolution.weight": torch.ones(4, 4, 3, 3) for i in range(5)}
    message = refused(write(tmp_path / "unknown.safetensors", tensors)).stderr
    assert "5 tensors and no graph" in message
    assert "rbr_dense.0.convolution.weight 4×4×3×3" in message
    assert "(the nearest: YOLOv7, *.rbr_dense.0.weight)" in message
    assert "Give it with --arch file.py:callable" in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--target", "full"), "--target full needs a graph"),
        (("--input", "1,3,8,8"), "--input needs a graph"),
        (("--blocks", "a*"), "--blocks needs a graph"),
        (("--target", "all"), "needed: full or deploy"),
    ],
)
def test_an_option_that_needs_a_graph_is_not_ignored(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    source = write(tmp_path / "w.safetensors", drawn(named(a=RepVGG(4, 4)), 1e-5).state_dict())
    assert reason in refused(source, *options).stderr


def test_plain_pairs_of_an_unknown_network_are_not_folded(tmp_path: Path) -> None:
    model = drawn(named(stem=conv_bn(3, 4, 3), body=conv_bn(4, 4, 3)), 1e-5)
    assert "no known family" in refused(write(tmp_path / "w.safetensors", model.state_dict())).stderr


def test_the_report_of_weights_alone_lists_assumptions_and_no_input(tmp_path: Path) -> None:
    source = write(tmp_path / "w.safetensors", drawn(named(a=RepVGG(4, 4)), 1e-5).state_dict())
    done = run("fuse", source, tmp_path / "out.safetensors")
    assert done.exit_code == 0
    assert "weights alone" in done.stdout
    assert "\ninput" not in done.stdout
    assert "Assumed   every norm has eps 1e-05 (as RepVGG uses it; --eps sets it)" in done.stdout
    assert "\nPARTIAL" in done.stdout
    assert run("fuse", source, tmp_path / "strict.safetensors", "--strict").exit_code == 1
    assert not (tmp_path / "strict.safetensors").exists()


def test_a_graph_with_deploy_target_and_no_family_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), tmp_path / "plain.pt")
    message = refused(tmp_path / "plain.pt", "--target", "deploy", "--input", "1,1,8,8").stderr
    assert "--target full" in message


def test_eps_with_a_graph_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), tmp_path / "plain.pt")
    assert "--eps is for weights alone" in refused(tmp_path / "plain.pt", "--eps", "1e-3").stderr


def test_an_error_of_our_own_kind_names_the_file(tmp_path: Path) -> None:
    source = write(tmp_path / "unknown.safetensors", {"w": torch.ones(2)})
    with pytest.raises(InputError, match=r"unknown\.safetensors: it holds 1 tensors"):
        convert.fuse(source, tmp_path / "out.safetensors", Options())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers_are_named_and_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = drawn(named(a=RepVGG(4, 4)), 1e-5).state_dict()
    tensors["a.rbr_1x1.conv.weight"] = (tensors["a.rbr_1x1.conv.weight"] * 20).to(dtype)
    source = write(tmp_path / "weights.safetensors", tensors)
    with pytest.raises(InputError, match=r"block a: tensor a\.rbr_1x1\.conv\.weight is \w+; needed: weights in"):
        convert.fuse(source, tmp_path / "out.safetensors", Options())
    assert not (tmp_path / "out.safetensors").exists()
