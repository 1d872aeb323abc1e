"""The catalogue: real model classes of the libraries that people use, with random weights, and their own converters.

Nothing is downloaded. Libraries are imported only when a model of theirs is built, and never by ``repconv_cli``.
ultralytics is AGPL-licensed: it is a test dependency alone.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks import zoo_transformers as hf
from benchmarks.randomise import randomise

# Set before any library reads them: no look-ups on the network, no telemetry, no settings file in the user's home.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "YOLO_OFFLINE": "true",
        "YOLO_VERBOSE": "false",
        "YOLO_CONFIG_DIR": tempfile.gettempdir(),
    }
)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
SEED = 0


@dataclass(frozen=True)
class Converter:
    """What a library (or torch) offers to fuse a model; ``convert`` may change the module that it is given."""

    name: str
    convert: Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class ZooModel:
    """One model class: how it is made, what it is fed, and what it is measured against.

    ``before_choice`` names the outputs that come before a top-k; rounding reorders what comes after it, so in the
    model's own dtype only those are judged. Empty: all outputs are. ``norms_left`` are batch norms that no converter
    can fold: they stand behind an activation or a concatenation.
    """

    name: str
    make: Callable[[], nn.Module]
    feed: Callable[[int, torch.Generator], Inputs]
    own: Converter | None = None
    convs_by_hand: int | None = None
    norms_left: int = 0
    before_choice: tuple[str, ...] = ()
    in_tests: bool = False

    def build(self) -> nn.Module:
        """Return the model in eval mode; the same weights and statistics on every call."""
        torch.manual_seed(SEED)
        module = self.make().eval()
        # Enough samples that statistics at one position, at the end of a net, hold for other inputs too.
        args, kwargs = self.example(batch=16, seed=SEED + 1)
        randomise(module, lambda m: m(*args, **kwargs), SEED)
        # Some heads keep what depends on the input's shape: let them have it before anyone looks.
        args, kwargs = self.example()
        with torch.no_grad():
            module(*args, **kwargs)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module

    def example(self, batch: int = 2, seed: int = SEED) -> Inputs:
        """Return (args, kwargs) to call the model with."""
        return self.feed(batch, torch.Generator().manual_seed(seed))

    def build_own(self, module: nn.Module) -> nn.Module | None:
        """Return ``module`` as the library's own converter leaves it, or None where there is none."""
        return None if self.own is None else self.own.convert(copy.deepcopy(module)).eval()

    def judged(self, outputs: Any) -> list[Tensor]:
        """Return the outputs that rounding cannot reorder."""
        if self.before_choice:
            outputs = [outputs[name] for name in self.before_choice]
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def image(channels: int, height: int, width: int | None = None, name: str | None = None) -> Callable[..., Inputs]:
    """Return a feed of normal noise images, positional or by ``name``."""

    def feed(batch: int, generator: torch.Generator) -> Inputs:
        x = torch.randn(batch, channels, height, width or height, generator=generator)
        return ((x,), {}) if name is None else ((), {name: x})

    return feed


def pyramid(channels: tuple[int, ...], finest: int) -> Callable[..., Inputs]:
    """Return a feed of feature maps as several positional inputs, each half the size of the one before."""

    def feed(batch: int, generator: torch.Generator) -> Inputs:
        sizes = [finest >> level for level in range(len(channels))]
        return tuple(torch.randn(batch, c, s, s, generator=generator) for c, s in zip(channels, sizes, strict=True)), {}

    return feed


def image_pair(height: int) -> Callable[..., Inputs]:
    """Return a feed of image pairs ``(batch, 2, 3, height, height)``."""
    return lambda batch, generator: (
        (),
        {"pixel_values": torch.randn(batch, 2, 3, height, height, generator=generator)},
    )


def tokens(batch: int, generator: torch.Generator) -> Inputs:
    """Feed token ids and an attention mask, by name."""
    ids = hf.token_ids(batch, generator)
    return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _reparameterize(module: nn.Module) -> nn.Module:
    import timm

    found: nn.Module = timm.utils.reparameterize_model(module, inplace=True)
    return found


def _fuse_yolo(module: nn.Module) -> nn.Module:
    module.model.fuse(verbose=False)  # type: ignore[operator, union-attr]
    return module


def _fold_with_fx(module: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(module)


TIMM = Converter("timm", _reparameterize)
ULTRALYTICS = Converter("ultralytics", _fuse_yolo)
TORCH_FX = Converter("torch.fx", _fold_with_fx)


def _timm(name: str, size: int = 96, **more: Any) -> ZooModel:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return ZooModel(f"timm:{name}", make, image(3, size), TIMM, **more)


def _torchvision(name: str, size: int = 96, options: dict[str, Any] | None = None, **more: Any) -> ZooModel:
    def make() -> nn.Module:
        import torchvision

        module: nn.Module = torchvision.models.get_model(name, weights=None, **(options or {}))
        return module

    return ZooModel(f"torchvision:{name}", make, image(3, size), TORCH_FX, **more)


class _Detector(nn.Module):
    """A YOLO as it is used for inference: its detections, and the boxes and scores that they are made of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head = model.model[-1]  # type: ignore[index]
        # With two heads the one without suppression is the one to use; the other is for training.
        head.end2end = getattr(head, "one2one_cv2", None) is not None
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``detections``, and ``boxes`` and ``scores`` before any top-k."""
        detections, raw = self.model(x)
        raw = raw.get("one2one", raw)
        return {"detections": detections, "boxes": raw["boxes"], "scores": raw["scores"]}


class _TransformerDetector(nn.Module):
    """An ultralytics RT-DETR: its detections, and the feature maps that its decoder reads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``detections``, and the ``fine``, ``middle`` and ``coarse`` maps before the decoder's top-k."""
        values: list[Tensor] = []
        *body, head = self.model.model  # type: ignore[misc, union-attr]
        for layer in body:
            sources = [layer.f] if isinstance(layer.f, int) else layer.f
            given = [x if f == -1 else values[f] for f in sources]
            x = layer(given[0] if len(given) == 1 else given)
            values.append(x)
        fine, middle, coarse = (values[f] for f in head.f)
        detections, _ = head([fine, middle, coarse])
        return {"detections": detections, "fine": fine, "middle": middle, "coarse": coarse}


def _yolo(yaml: str, **more: Any) -> ZooModel:
    def make() -> nn.Module:
        from ultralytics.nn.tasks import DetectionModel

        return _Detector(DetectionModel(f"{yaml}.yaml", verbose=False))

    # 64 gives every level more than one position, and 96 three at the coarsest.
    return ZooModel(f"ultralytics:{yaml}", make, image(3, 96), ULTRALYTICS, before_choice=("boxes", "scores"), **more)


def _rtdetr(yaml: str, **more: Any) -> ZooModel:
    def make() -> nn.Module:
        from ultralytics.nn.tasks import RTDETRDetectionModel

        return _TransformerDetector(RTDETRDetectionModel(f"{yaml}.yaml", verbose=False))

    maps = ("fine", "middle", "coarse")
    return ZooModel(f"ultralytics:{yaml}", make, image(3, 160), ULTRALYTICS, before_choice=maps, **more)


def _transformers(name: str, make: Callable[[], nn.Module], feed: Callable[..., Inputs], **more: Any) -> ZooModel:
    return ZooModel(f"transformers:{name}", make, feed, **more)


_PIXELS = "pixel_values"
_BEFORE_TOP_K = ("enc_outputs_class", "encoder_last_hidden_state")

CATALOGUE: tuple[ZooModel, ...] = (
    _timm("repvgg_a0", in_tests=True),
    _timm("repvgg_b1g4"),
    _timm("mobileone_s0"),
    _timm("mobileone_s1", in_tests=True),
    _timm("mobileone_s4"),
    _timm("fastvit_t8", in_tests=True),
    _timm("fastvit_sa12"),
    _timm("fastvit_mci0"),
    _timm("repvit_m0_9", in_tests=True),
    _timm("repghostnet_050", in_tests=True),
    _timm("ghostnetv3_050", in_tests=True),
    _timm("lcnetv2_small", in_tests=True),
    _timm("nextvit_small", norms_left=7),
    _timm("shvit_s1"),
    _timm("levit_128s", 224, in_tests=True),
    _timm("levit_conv_128s", 224),
    _timm("tiny_vit_5m_224", 224),
    _timm("efficientvit_m0", 224),
    _timm("iformer_t"),
    _timm("efficientvim_m1"),
    _timm("coat_lite_tiny", 224, in_tests=True),
    _timm("davit_tiny"),
    _timm("twins_svt_small", 224),
    _timm("csatv2", 256),
    _timm("hgnetv2_b0"),
    _timm("resnet18"),
    _transformers(
        "rt_detr_r18",
        hf.rt_detr_r18,
        image(3, 160, name=_PIXELS),
        convs_by_hand=57,
        before_choice=_BEFORE_TOP_K,
    ),
    _transformers("rt_detr_v2_r18", hf.rt_detr_v2_r18, image(3, 160, name=_PIXELS), before_choice=_BEFORE_TOP_K),
    _transformers(
        "d_fine_s",
        hf.d_fine_s,
        image(3, 160, name=_PIXELS),
        convs_by_hand=91,
        in_tests=True,
        before_choice=_BEFORE_TOP_K,
    ),
    _transformers("deimv2_n", hf.deimv2_n, image(3, 320, name=_PIXELS), before_choice=_BEFORE_TOP_K),
    _transformers("omdet_turbo_encoder", hf.omdet_turbo_encoder, pyramid((192, 384, 768), 20)),
    _transformers("pp_doclayout_v3", hf.pp_doclayout_v3, image(3, 160, name=_PIXELS), before_choice=_BEFORE_TOP_K),
    _transformers("efficientloftr", hf.efficient_loftr, image_pair(64)),
    _transformers(
        "efficientloftr_backbone", hf.efficient_loftr_backbone, image(1, 64), convs_by_hand=21, in_tests=True
    ),
    _transformers("textnet_tiny", hf.textnet_tiny, image(3, 64, name=_PIXELS), convs_by_hand=16, in_tests=True),
    _transformers("pp_lcnet_v3", hf.pp_lcnet_v3, image(3, 64, name=_PIXELS), convs_by_hand=33, in_tests=True),
    _transformers(
        "pp_ocrv5_mobile_det",
        hf.pp_ocrv5_mobile_det,
        image(3, 96, name=_PIXELS),
        # 62 and the two transposed convolutions of its head, which are counted as well.
        convs_by_hand=62 + 2,
        in_tests=True,
    ),
    _transformers("pp_ocrv5_server_det", hf.pp_ocrv5_server_det, image(3, 96, name=_PIXELS)),
    _transformers("sam3_lite_text", hf.sam3_lite_text, tokens),
    _yolo("yolov6n"),
    _yolo("yolov8n"),
    _yolo("yolov9t", in_tests=True),
    _yolo("yolov10n", in_tests=True),
    _yolo("yolo11n"),
    _rtdetr("rtdetr-l"),
    _torchvision("resnet18"),
    _torchvision("mobilenet_v3_small", in_tests=True),
    _torchvision("googlenet", options={"init_weights": False, "aux_logits": False}),
    _torchvision("densenet121", norms_left=58, in_tests=True),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("mnasnet0_5"),
    _torchvision("inception_v3", 128, {"init_weights": False, "aux_logits": False}),
)


def find(name: str) -> ZooModel:
    """Return the catalogue's model of that name."""
    return next(model for model in CATALOGUE if model.name == name)
