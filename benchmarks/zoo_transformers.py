"""Model classes of ``transformers`` that hold re-parameterizable blocks, built from their published configurations.

The figures are those of the published checkpoints' configurations; nothing is downloaded, weights are random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HGNET_B0: dict[str, Any] = {
    "hidden_sizes": [128, 256, 512, 1024],
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
}
RESNET_18: dict[str, Any] = {
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
RT_DETR_R18: dict[str, Any] = {
    "encoder_in_channels": [128, 256, 512],
    "hidden_expansion": 0.5,
    "decoder_layers": 3,
}


def rt_detr_r18() -> nn.Module:
    """RT-DETR with a ResNet-18 backbone, as published for COCO."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    return RTDetrForObjectDetection(
        RTDetrConfig(num_labels=80, backbone_config=RTDetrResNetConfig(**RESNET_18), **RT_DETR_R18)
    )


def rt_detr_v2_r18() -> nn.Module:
    """RT-DETRv2 with a ResNet-18 backbone."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(
        RTDetrV2Config(num_labels=80, backbone_config=RTDetrResNetConfig(**RESNET_18), **RT_DETR_R18)
    )


def d_fine_s() -> nn.Module:
    """D-FINE small: HGNetV2-B0 with learnable affine blocks."""
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    config = DFineConfig(
        num_labels=80,
        backbone_config=HGNetV2Config(**HGNET_B0, out_indices=[2, 3, 4]),
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
    )
    return DFineForObjectDetection(config)


def deimv2_n() -> nn.Module:
    """DEIMv2 nano: two levels of HGNetV2-B0, 128 channels."""
    from transformers import Deimv2Config, Deimv2ForObjectDetection, HGNetV2Config

    config = Deimv2Config(
        num_labels=80,
        backbone_config=HGNetV2Config(**HGNET_B0, out_indices=[3, 4]),
        encoder_in_channels=[512, 1024],
        encoder_hidden_dim=128,
        encoder_ffn_dim=512,
        encode_proj_layers=[1],
        feat_strides=[16, 32],
        hidden_expansion=0.34,
        depth_mult=0.5,
        d_model=128,
        num_feature_levels=2,
        decoder_in_channels=[128, 128],
        decoder_ffn_dim=512,
        decoder_layers=3,
        decoder_n_points=[6, 6],
    )
    return Deimv2ForObjectDetection(config)


def omdet_turbo_encoder() -> nn.Module:
    """OmDet-Turbo's hybrid encoder on a tiny backbone's channels; the rest of the model holds no such block."""
    from transformers import OmDetTurboConfig
    from transformers.models.omdet_turbo.modeling_omdet_turbo import OmDetTurboHybridEncoder

    return _Features(OmDetTurboHybridEncoder(OmDetTurboConfig(encoder_in_channels=[192, 384, 768])))


class _Features(nn.Module):
    """Calls a neck with its feature maps as arguments of their own, and keeps what is a tensor of its output."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, *maps: Tensor) -> Any:
        """Return the neck's output on ``maps``, finest first."""
        return self.neck(list(maps), output_attentions=False, output_hidden_states=False, return_dict=True)[:2]


def pp_doclayout_v3() -> nn.Module:
    """PP-DocLayoutV3: RT-DETR on HGNetV2-L with masks and a reading order."""
    from transformers import PPDocLayoutV3Config, PPDocLayoutV3ForObjectDetection

    return PPDocLayoutV3ForObjectDetection(PPDocLayoutV3Config())


def efficient_loftr() -> nn.Module:
    """EfficientLoFTR's features of an image pair, before the matching, whose shape depends on the data."""
    from transformers import EfficientLoFTRConfig, EfficientLoFTRModel

    return EfficientLoFTRModel(EfficientLoFTRConfig())


def efficient_loftr_backbone() -> nn.Module:
    """EfficientLoFTR's RepVGG backbone alone."""
    module = efficient_loftr().backbone
    assert isinstance(module, nn.Module)
    return module


def textnet_tiny() -> nn.Module:
    """TextNet tiny."""
    from transformers import TextNetConfig, TextNetModel

    config = TextNetConfig(
        conv_layer_kernel_sizes=[
            [[3, 3], [3, 3], [3, 3]],
            [[3, 3], [1, 3], [3, 3], [3, 1]],
            [[3, 3], [3, 3], [3, 1], [1, 3]],
            [[3, 3], [3, 1], [1, 3], [3, 3]],
        ],
        conv_layer_strides=[[1, 2, 1], [2, 1, 1, 1], [2, 1, 1, 1], [2, 1, 1, 1]],
    )
    return TextNetModel(config)


def pp_lcnet_v3() -> nn.Module:
    """PP-LCNetV3 at scale 1, all stages."""
    from transformers import PPLCNetV3Config
    from transformers.models.pp_lcnet_v3.modeling_pp_lcnet_v3 import PPLCNetV3Backbone

    return PPLCNetV3Backbone(PPLCNetV3Config(out_indices=[2, 3, 4, 5]))


def pp_ocrv5_mobile_det() -> nn.Module:
    """PP-OCRv5 mobile text detector."""
    from transformers import PPOCRV5MobileDetConfig, PPOCRV5MobileDetForObjectDetection

    return PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig())


def pp_ocrv5_server_det() -> nn.Module:
    """PP-OCRv5 server text detector, on HGNetV2-L; sums k×k, k×1 and 1×k convolutions."""
    from transformers import PPOCRV5ServerDetConfig, PPOCRV5ServerDetForObjectDetection

    # (kernel, stride, padding) of a pointwise layer on each end, and of three branches at each of three lengths.
    block: dict[str, list[Any]] = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]}
    for length, k in (("long", 7), ("mid", 5), ("short", 3)):
        block[f"vertical_long_to_small_conv_{length}ratio"] = [[k, 1], [1, 1], [k // 2, 0]]
        block[f"horizontal_small_to_long_conv_{length}ratio"] = [[1, k], [1, 1], [0, k // 2]]
        block[f"symmetric_conv_long_{length}ratio"] = [[k, k], [1, 1], [k // 2, k // 2]]
    config = PPOCRV5ServerDetConfig(
        intraclass_block_config=block, scale_factor_list=[1, 2, 4, 8], kernel_list=[3, 2, 2]
    )
    return PPOCRV5ServerDetForObjectDetection(config)


def sam3_lite_text() -> nn.Module:
    """SAM3-LiteText's text encoder: RepMixer blocks first and last."""
    from transformers.models.sam3_lite_text.configuration_sam3_lite_text import Sam3LiteTextTextConfig
    from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextModel

    return Sam3LiteTextTextModel(Sam3LiteTextTextConfig())


def token_ids(batch: int, generator: torch.Generator) -> Tensor:
    """Return ids of full sentences of 77 tokens."""
    return torch.randint(0, 49407, (batch, 77), generator=generator)
