"""--arch of the libraries: options, files of the user's own, and what a YAML may not say."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import repconv_cli
from repconv_cli.checkpoint.architectures import make_architecture
from repconv_cli.checkpoint.importing import library_code
from repconv_cli.errors import InputError, UnsafeFileError
from tests.checkpoint.tensor_checks import randomised
from tests.cli.runs import run_process

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "YOLO_CONFIG_DIR": tempfile.gettempdir()}


def classes_of(module: nn.Module) -> int:
    return [tensor.shape[0] for tensor in module.state_dict().values() if tensor.ndim == 2][-1]


def test_options_follow_the_name_of_a_model() -> None:
    timm = make_architecture("timm:repghostnet_050,num_classes=7,in_chans=1,drop_rate=0.5").module
    assert (classes_of(timm), timm.drop_rate) == (7, 0.5)
    assert classes_of(make_architecture("torchvision:mobilenet_v3_small,num_classes=5").module) == 5
    yolo: Any = make_architecture("ultralytics:yolov9t.yaml,nc=3").module
    assert (type(yolo).__name__, yolo.model[-1].nc) == ("DetectionModel", 3)


def test_options_follow_a_callable_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import math\nfrom torch import nn\n"
        "def make(width=4, weights=1, name=''):\n    assert weights is None\n    return nn.Linear(width, len(name))\n"
    )
    made: Any = make_architecture(f"{tmp_path / 'net.py'}:make,width=8,weights=None,name=wide").module
    assert (made.in_features, made.out_features) == (8, 4)
    for name, reason in (
        ("make,breadth=3", "TypeError.*breadth.*Options follow its name"),
        ("make,width", "the option width after the architecture"),
        ("maker", "has no callable maker; did you mean make"),
        ("math", "has no callable math, but a module"),
    ):
        with pytest.raises(InputError, match=reason):
            make_architecture(f"{tmp_path / 'net.py'}:{name}")


def test_a_model_with_a_backbone_fetches_nothing() -> None:
    names = make_architecture("torchvision:lraspp_mobilenet_v3_large,num_classes=3").module.state_dict()
    assert names["classifier.low_classifier.bias"].shape == (3,)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("timm:repvgg_a0,num_classes", "the option num_classes after the architecture; needed: key=value"),
        ("timm:repvgg_a0,pretrained=true", "the option pretrained=true"),
        ("timm:repvgg_a0,__class__=1", "the option __class__=1"),
        ("timm:hf-hub:evil/model", "hf-hub:evil/model; needed: the name of an architecture of timm"),
        ("timm:repvgg_z9", "timm:repvgg_z9 failed.*Unknown model"),
        ("timm:repvgg_a0,nonsense=1", "failed: TypeError.*nonsense"),
        ("torchvision:nothing", "torchvision:nothing failed"),
        ("ultralytics:yolov99z.yaml", "ultralytics has no model yolov99z.yaml; it has "),
        ("ultralytics:../x.yaml", "needed: a file, or the name of a YAML in the package"),
        ("ultralytics:https://evil/x.yaml", "needed: a file, or the name of a YAML in the package"),
        ("transformers:/nowhere", "no such file"),
        ("nonsense", r"needed: file\.py:callable, timm:NAME, torchvision:NAME, transformers:DIR or ultralytics:YAML"),
    ],
)
def test_an_architecture_that_cannot_be_made_says_why(arch: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make_architecture(arch)


def test_another_number_of_classes_is_told_with_the_option(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("repghostnet_050", num_classes=7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"append it to --arch: …,num_classes=7"):
        repconv_cli.inspect(tmp_path / "w.pt", arch="timm:repghostnet_050")
    result = repconv_cli.inspect(tmp_path / "w.pt", arch="timm:repghostnet_050,num_classes=7", input=(1, 3, 32, 32))
    assert result.blocks


YAML = """
nc: 3
activation: nn.ReLU()
scales:
  n: [0.5, 0.25, 64]
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, RepC3, [16]]
  - [-1, 1, nn.MaxPool2d, [2, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, nn.Upsample, [None, 2, "nearest"]]
  - [[-1, 2], 1, Concat, [1]]
head:
  - [-1, 1, Classify, [nc]]
"""


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    (tmp_path / "net.yaml").write_text(YAML)
    return tmp_path / "net.yaml"


def test_a_yaml_of_the_users_own_fuses(yaml: Path, tmp_path: Path) -> None:
    made = make_architecture(f"ultralytics:{yaml}").module
    assert type(made).__name__ == "ClassificationModel"
    torch.save(randomised(made).state_dict(), tmp_path / "w.pt")
    out = tmp_path / "out.safetensors"
    result = repconv_cli.fuse(tmp_path / "w.pt", out, arch=f"ultralytics:{yaml}", input=(1, 3, 32, 32), samples=1)
    assert result.verification
    assert result.totals is not None
    assert result.totals.norms.after == 0
    assert "the architecture's own names begin with 'model.', which therefore stayed" in result.source.notes


def test_a_yaml_that_fails_leaves_the_librarys_activation_as_it_was(tmp_path: Path) -> None:
    """ultralytics sets a YAML's activation for every model of the process before it builds this one."""
    from ultralytics.nn.modules import Conv

    (tmp_path / "net.yaml").write_text(YAML.replace("[16, 3, 2]", '["x", 3, 2]'))
    before = Conv.default_act
    with pytest.raises(InputError, match="failed"):
        make_architecture(f"ultralytics:{tmp_path / 'net.yaml'}")
    assert Conv.default_act is before


ODD_YAML = [
    ("activation", "nn.ReLU()", "__import__('os').mkdir('marker')", UnsafeFileError, "has the activation __import__"),
    ("a function", "RepC3", "torch_safe_load", UnsafeFileError, "names torch_safe_load; needed: a module"),
    ("a class of no module", "RepC3", "Path", UnsafeFileError, "names Path; needed: a module"),
    ("an attribute", "RepC3", "nn.init.zeros_", UnsafeFileError, "names nn.init.zeros_"),
    ("what fetches", "RepC3", "TorchVision", UnsafeFileError, "names the module TorchVision"),
    ("a text", '"nearest"', '"f(1)"', UnsafeFileError, r"holds the text f\(1\)"),
    ("an object", "nc: 3", "nc: !!python/object/apply:os.mkdir ['marker']", InputError, "is not YAML"),
    ("no layers", "backbone:", "body:", InputError, "is not YAML|no model|failed"),
    ("a number", "Classify", "3", UnsafeFileError, "names the module 3"),
]


@pytest.mark.parametrize(("old", "new", "kind", "reason"), [o[1:] for o in ODD_YAML], ids=[o[0] for o in ODD_YAML])
def test_a_yaml_that_the_library_would_evaluate_is_refused(yaml: Path, old, new, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    yaml.write_text(YAML.replace(old, new))
    with pytest.raises(kind, match=reason):
        make_architecture(f"ultralytics:{yaml}")
    assert not Path("marker").exists()


def test_what_a_library_prints_is_no_part_of_the_report(yaml: Path, tmp_path: Path) -> None:
    """ultralytics announces a new settings file on stdout when it is first imported."""
    torch.save(make_architecture(f"ultralytics:{yaml}").module, tmp_path / "m.pt")
    (tmp_path / "settings").mkdir()
    arguments = ("inspect", tmp_path / "m.pt", "--trust", "ultralytics", "--input", "1,3,32,32", "--json")
    done = run_process("-m", "repconv_cli", *arguments, YOLO_CONFIG_DIR=str(tmp_path / "settings"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"]


def test_library_code_runs_offline_and_leaves_no_trace() -> None:
    import huggingface_hub.constants as hub

    before = (dict(os.environ), hub.HF_HUB_OFFLINE, sys.stdout)
    with library_code():
        assert hub.HF_HUB_OFFLINE is True
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert (dict(os.environ), hub.HF_HUB_OFFLINE, sys.stdout) == before


def test_older_names_of_transformers_are_renamed_by_its_rules(tmp_path: Path) -> None:
    """A model's own body, without its head's prefix, saved by another class of the same family."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    model = randomised(ResNetModel(config)).eval()
    model.save_pretrained(tmp_path)
    state = {f"resnet.{key}": value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "w.bin")
    result = repconv_cli.inspect(tmp_path / "w.bin", arch=f"transformers:{tmp_path}", input=(1, 3, 32, 32))
    assert result.blocks
    assert "older names were changed by the rules of transformers" in result.source.notes
