"""The round trip of timm's own classes: the smallest model of each architecture that has a converter.

All of them are in ``benchmarks/round_trip.py``, which takes an hour.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model

from benchmarks.round_trip import travel
from repconv_cli.checkpoint.families.find import find_blocks
from repconv_cli.checkpoint.families.recognise import family_of

SMALLEST = (
    "efficientvim_m1", "efficientvit_m0", "fastvit_t8", "fastvit_mci0", "ghostnetv3_050", "iformer_t",
    "iformer_m_distilled", "lcnetv2_small", "levit_128s", "levit_conv_128s", "mobileone_s1", "nextvit_small",
    "repghostnet_050", "repvgg_a0", "repvit_m0_9", "repvit_m1", "shvit_s1", "tiny_vit_5m_224",
)  # fmt: skip


@pytest.mark.parametrize("name", SMALLEST)
def test_the_names_in_deploy_form_are_those_of_timms_own_conversion(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        deploy = reparameterize_model(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    family = family_of(shapes)
    assert family is not None
    found = find_blocks(family, shapes)
    keys = {*found.kept, *(f"{block.target}.{leaf}" for block in found.blocks for leaf in ("weight", "bias"))}
    assert keys == set(deploy.state_dict())
    fused = {key: tuple(tensor.shape) for key, tensor in deploy.state_dict().items()}
    again = family_of(fused)
    assert again is not None
    assert find_blocks(again, fused).blocks == ()


@pytest.mark.parametrize("name", ["lcnetv2_small", "repghostnet_050", "nextvit_small", "levit_128s"])
def test_the_round_trip(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trip = travel(name)
    assert trip.problem == ""
    assert trip.is_right, trip


def test_ultralytics_loads_the_file_into_its_fused_model(tmp_path: Path) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    from repconv_cli import convert
    from repconv_cli.options import Options

    model = tasks.DetectionModel("yolov10n.yaml", verbose=False).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in model.state_dict().items():
        # The bins of the box distribution are numbers of the architecture.
        if tensor.is_floating_point() and ".dfl." not in key:
            tensor.uniform_(*((0.5, 2.0) if key.endswith("running_var") else (-0.1, 0.1)), generator=generator)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    convert.fuse(tmp_path / "weights.safetensors", tmp_path / "deploy.safetensors", Options())
    deploy = model.fuse(verbose=False)
    own = {key: tensor.clone() for key, tensor in deploy.state_dict().items()}
    found = load_file(tmp_path / "deploy.safetensors")
    deploy.load_state_dict(found, strict=True)
    for key, tensor in own.items():
        assert torch.allclose(found[key].double(), tensor.double(), rtol=1e-4, atol=1e-5), key
