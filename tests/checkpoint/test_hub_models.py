"""Folders of timm and transformers: the model that config.json describes, made by the installed library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import repconv_cli
from repconv_cli.checkpoint import read
from repconv_cli.errors import InputError, UnsafeFileError
from tests.checkpoint.tensor_checks import randomised, same_tensors


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm's own push_to_hub writes it, of a model whose every size differs from the default."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    model = randomised(timm.create_model("repvgg_a0", num_classes=7, in_chans=1)).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 64, 64)}
    save_for_hf(model, folder, model_config={"num_classes": 7}, safe_serialization="both")
    return folder


def test_a_timm_folder_fuses_without_arch(timm_folder: Path, tmp_path: Path) -> None:
    result = repconv_cli.fuse(timm_folder, tmp_path / "out.safetensors", samples=1)
    assert result.verification
    assert result.totals is not None
    assert (result.totals.convs.before, result.totals.convs.after) == (44, 22)
    assert result.input.examples == ((2, 1, 64, 64),)
    assert "repvgg_a0 of the installed timm, as config.json describes it" in result.source.notes
    assert repconv_cli.load(tmp_path / "out.safetensors")(torch.rand(1, 1, 64, 64)).shape == (1, 7)


def with_config(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a folder and change its config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


TIMM_CONFIGS = [
    ("fetched", lambda c: c.update(architecture="hf-hub:evil/model"), UnsafeFileError, "hf-hub:evil/model"),
    ("a path", lambda c: c.update(architecture="local-dir:/tmp"), UnsafeFileError, "no path and no address"),
    ("unknown", lambda c: c.update(architecture="repvgg_z9"), InputError, "timm cannot make a repvgg_z9"),
    ("weights", lambda c: c.update(model_args={"checkpoint_path": "x.pt"}), UnsafeFileError, "sets checkpoint_path"),
    ("a layer", lambda c: c.update(model_args={"act_layer": "f()"}), UnsafeFileError, "its act_layer is"),
    ("an odd key", lambda c: c.update(model_args={"a b": 1}), UnsafeFileError, "has an entry called a b"),
    ("classes", lambda c: c["model_args"].update(num_classes=9), InputError, r"needed: \(9, 1280\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "reason"), [c[1:] for c in TIMM_CONFIGS], ids=[c[0] for c in TIMM_CONFIGS])
def test_a_timm_config_that_does_not_fit_is_refused(timm_folder, tmp_path, change, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=reason):
        repconv_cli.inspect(with_config(timm_folder, tmp_path, change))


@pytest.fixture(scope="module")
def textnet() -> nn.Module:
    from transformers import TextNetConfig, TextNetForImageClassification

    torch.manual_seed(0)
    sizes = [[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]]
    strides = [[1], [2, 1], [2, 1], [2]]
    config = TextNetConfig(
        conv_layer_kernel_sizes=sizes, conv_layer_strides=strides, hidden_sizes=[8, 8, 12, 12, 16], stem_out_channels=8,
        num_labels=5, image_size=[32, 48],
    )  # fmt: skip
    return randomised(TextNetForImageClassification(config)).eval()


@pytest.fixture(scope="module")
def textnet_folder(textnet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textnet")
    textnet.save_pretrained(folder)
    return folder


def test_a_transformers_folder_fuses_without_arch(textnet: nn.Module, textnet_folder: Path, tmp_path: Path) -> None:
    result = repconv_cli.fuse(textnet_folder, tmp_path / "out.safetensors")
    assert result.verification
    assert result.totals is not None
    assert result.totals.norms.after == 0
    assert result.totals.convs.after < result.totals.convs.before
    assert result.input.examples == ((2, 3, 32, 48),)
    x = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        found, wanted = repconv_cli.load(tmp_path / "out.safetensors")(pixel_values=x), textnet(pixel_values=x)
    torch.testing.assert_close(found["logits"], wanted.logits, rtol=1e-4, atol=1e-4)


def test_weights_alone_with_the_folder_as_arch_give_the_same_file(textnet_folder: Path, tmp_path: Path) -> None:
    weights = textnet_folder / "model.safetensors"
    one = repconv_cli.fuse(textnet_folder, tmp_path / "a.safetensors")
    two = repconv_cli.fuse(weights, tmp_path / "b.safetensors", arch=f"transformers:{textnet_folder}")
    assert (one.blocks, one.totals) == (two.blocks, two.totals)
    same_tensors(read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors").tensors or {})


HF_CONFIGS = [
    ("remote code", lambda c: c.update(auto_map={"AutoModel": "m.X"}), UnsafeFileError, "code from the hub.*never run"),
    ("quantized", lambda c: c.update(quantization_config={"bits": 4}), InputError, "weights are quantized"),
    ("no class", lambda c: c.pop("architectures"), InputError, "names no model"),
    ("another class", lambda c: c.update(architectures=["ResNetModel"]), InputError, "no model of the type textnet"),
    ("no model class", lambda c: c.update(architectures=["pipeline"]), InputError, "no model class pipeline"),
    ("unknown type", lambda c: c.update(model_type="new"), InputError, "knows no model type new"),
    ("a path", lambda c: c.update(backbone="/tmp/evil"), UnsafeFileError, "names the model /tmp/evil"),
    ("a path inside", lambda c: c.update(backbone_config={"backbone": "a/b"}), UnsafeFileError, "names the model a/b"),
    ("class as a path", lambda c: c.update(architectures=["os.system"]), InputError, "no model class os.system"),
    ("other sizes", lambda c: c.update(hidden_sizes=[8, 8, 12, 12, 20]), InputError, "has shape"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "reason"), [c[1:] for c in HF_CONFIGS], ids=[c[0] for c in HF_CONFIGS])
def test_a_transformers_config_that_does_not_fit_is_refused(  # type: ignore[no-untyped-def]
    textnet_folder, tmp_path, change, kind, reason: str
) -> None:
    with pytest.raises(kind, match=reason):
        repconv_cli.inspect(with_config(textnet_folder, tmp_path, change))


GREEDY = [
    ("wide", lambda c: c.update(hidden_sizes=[8, 12_000, 12_000, 12, 16]), "values in its parameters|allocate"),
    ("wider", lambda c: c.update(hidden_sizes=[8, 1 << 40, 8, 12, 16]), "values in its parameters|cannot make"),
    ("deep", lambda c: c["conv_layer_kernel_sizes"][0].extend([[3, 3]] * 30_000), "more than 1.* parts; needed"),
    ("classes", lambda c: c.update(num_labels=1 << 31), "its num_labels is 2147483648; needed: the size of a model"),
    ("layers", lambda c: c.update(vision_config={"depths": [1 << 30]}), "its depths is 1073741824"),
]


@pytest.mark.parametrize(("change", "reason"), [g[1:] for g in GREEDY], ids=[g[0] for g in GREEDY])
def test_a_config_of_a_model_that_outgrows_its_weights_is_stopped(textnet_folder, tmp_path, change, reason) -> None:  # type: ignore[no-untyped-def]
    def changed(config: dict[str, Any]) -> None:
        change(config)
        for kernels in (config["conv_layer_kernel_sizes"][0],):
            config["conv_layer_strides"][0] = [1] * len(kernels)

    with pytest.raises(InputError, match=reason):
        repconv_cli.inspect(with_config(textnet_folder, tmp_path, changed))
    peak = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())["VmHWM"]
    assert int(peak.split()[0]) < 16 << 20, "kilobytes: nothing of that size was ever written to"


def test_where_kernels_and_weights_come_from_is_not_the_configs_to_say(textnet_folder: Path, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config |= {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel", "use_kernels": True}
        config |= {"use_pretrained_backbone": True, "_name_or_path": "evil/model", "dtype": "float16"}

    assert repconv_cli.inspect(with_config(textnet_folder, tmp_path, change)).blocks


def test_a_config_of_no_library_is_listed(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"dim": 3}')
    refused(tmp_path, InputError, "config.json: it names no model; its entries are dim")
