"""The families of re-parameterizable networks, by the names of their keys. Data; the first that matches a file is it.

A row is one kind of block: what is summed and what follows the sum, and where its one convolution goes in the deploy
form. ``X`` is the block's own path; an empty deploy path means that the convolution takes the block's place.
"""

from __future__ import annotations

from repconv_cli.checkpoint.families.parts import (
    Chain,
    Each,
    Family,
    Identity,
    Layer,
    Maybe,
    Minus,
    Norm,
    Part,
    Pool,
    Row,
    Scale,
    Shift,
    Sum,
)


def _chain(*parts: Part) -> Chain:
    return Chain(parts)


def _sum(*branches: Part) -> Sum:
    return Sum(branches)


def _normed(path: str, layer: str = "conv", norm: str = "bn") -> Chain:
    """A convolution and the norm after it."""
    return _chain(Layer(f"{path}.{layer}" if path else layer), Norm(f"{path}.{norm}" if path else norm))


# --- blocks that several families share ------------------------------------------------------------------------------

REPVGG = Row(_sum(_normed("rbr_dense"), _normed("rbr_1x1"), Maybe(Norm("rbr_identity"))), "rbr_reparam")
# The norm comes after the sum, and the 1x1 has none.
QA_REPVGG = Row(
    _chain(_sum(_normed("rbr_dense"), Layer("rbr_1x1"), Identity(if_square=True)), Norm("bn")), "rbr_reparam"
)
REPCONV_YOLOV7 = Row(
    _sum(_normed("rbr_dense", "0", "1"), _normed("rbr_1x1", "0", "1"), Maybe(Norm("rbr_identity"))), "rbr_reparam"
)
REPCONV = Row(_sum(_normed("conv1"), _normed("conv2"), Maybe(Norm("bn"))), "conv", ambiguous=True)
REPVGG_DEPTHWISE = Row(_sum(_normed("conv"), _normed("conv1")), "conv")
CONV2 = Row(_chain(_sum(Layer("conv"), Layer("cv2")), Norm("bn")), "conv", ambiguous=True)
CONV_NORM = Row(_normed(""), "conv")
TRANSPOSED_NORM = Row(_chain(Layer("conv_transpose", transposed=True), Norm("bn")), "conv_transpose")
CONV_NORM_LOST = Row(_normed(""), "")

DBB = Row(
    _sum(
        _normed("dbb_origin"),
        Maybe(_normed("dbb_1x1")),
        # A constant in the border stands for the norm of zeros: the padding comes before the first convolution.
        _chain(Maybe(_normed("dbb_avg", "conv", "bn.bn")), Pool(), Norm("dbb_avg.avgbn")),
        _chain(
            Maybe(Layer("dbb_1x1_kxk.idconv1", adds_identity=True)),
            Maybe(Layer("dbb_1x1_kxk.conv1")),
            Norm("dbb_1x1_kxk.bn1.bn"),
            _normed("dbb_1x1_kxk", "conv2", "bn2"),
        ),
    ),
    "dbb_reparam",
)
ACNET = Row(
    _sum(_normed("", "square_conv", "square_bn"), _normed("", "ver_conv", "ver_bn"), _normed("", "hor_conv", "hor_bn")),
    "fused_conv",
)
LARGE_KERNEL = Row(_sum(_normed("lkb_origin"), Maybe(_normed("small_conv"))), "lkb_reparam")
DILATED = _sum(
    _normed("dwconv", "lk_origin", "origin_bn"),
    Each(_chain(Layer("dwconv.dil_conv_k*_*", dilated=True), Norm("dwconv.dil_bn_k*_*"))),
)
MOBILEONE = Row(_sum(Each(_normed("rbr_conv.*")), Maybe(_normed("rbr_scale")), Maybe(Norm("rbr_skip"))), "reparam_conv")
MOBILEONE_TIMM = Row(
    _sum(Each(_normed("conv_kxk.*")), Maybe(_normed("conv_scale")), Maybe(Norm("identity"))), "reparam_conv"
)
REPVGG_TIMM = Row(_sum(_normed("conv_kxk"), Maybe(_normed("conv_1x1")), Maybe(Norm("identity"))), "reparam_conv")

# LeViT's children: a convolution and norm of short names, whose place the one convolution takes.
SHORT = Row(_normed("", "c", "bn"), "")
SHORT_HEAD = Row(_chain(Norm("bn"), Layer("l")), "")
TWO_HEADS = Row(
    Sum((_chain(Norm("head.bn"), Layer("head.l")), _chain(Norm("head_dist.bn"), Layer("head_dist.l"))), mean=True), ""
)
ONE_HEAD = Row(_chain(Norm("head.bn"), Layer("head.l")), "")
LINEAR_HEAD = Row(_chain(Norm("bn"), Layer("linear")), "")


def _normed_residual(path: str, gate: Scale | None = None) -> Row:
    """``x + gate · (norm(conv(x)) - x)``; without a gate, ``x + norm(conv(x))``."""
    branch = _normed(path, "conv", "norm")
    part = _sum(Identity(), branch if gate is None else _chain(_sum(branch, Minus(Identity())), gate))
    return Row(part, f"{path}.conv")


def _ghost(branches: str, deploy: str) -> Row:
    part = _sum(
        Each(_normed(f"{branches}_rpr_conv.*", "conv", "bn1")),
        Maybe(_normed(f"{branches}_rpr_scale", "conv", "bn1")),
        Maybe(Norm(f"{branches}_rpr_skip")),
    )
    return Row(part, deploy)


# --- the families, the more particular first -------------------------------------------------------------------------

FAMILIES = (
    Family(
        "super-gradients QARepVGG",
        ("*.branch_3x3.conv.weight", "*.branch_1x1.weight"),
        (
            Row(
                _chain(
                    _sum(
                        _normed("branch_3x3"),
                        _chain(Layer("branch_1x1"), Maybe(Scale("alpha"))),
                        Identity(if_square=True),
                    ),
                    Maybe(Norm("post_bn")),
                ),
                "rbr_reparam",
            ),
        ),
    ),
    Family(
        "super-gradients RepVGG",
        (
            "*.branch_3x3.conv.weight",
            "*.branch_1x1.conv.weight",
            "*.no_conv_branch.weight|*.alpha|*.rbr_reparam.weight",
        ),
        (
            Row(
                _sum(
                    _normed("branch_3x3"),
                    _chain(*_normed("branch_1x1").parts, Maybe(Scale("alpha"))),
                    Maybe(Norm("no_conv_branch")),
                ),
                "rbr_reparam",
            ),
        ),
    ),
    Family(
        "mmpretrain RepVGG",
        ("*.branch_3x3.conv.weight",),
        (Row(_sum(_normed("branch_3x3"), _normed("branch_1x1"), Maybe(Norm("branch_norm"))), "branch_reparam"),),
        fused=("*.branch_reparam.weight",),
    ),
    Family(
        "mmpretrain MobileOne",
        ("*.branch_conv_list.0.conv.weight",),
        (
            Row(
                _sum(Each(_normed("branch_conv_list.*")), Maybe(_normed("branch_scale")), Maybe(Norm("branch_norm"))),
                "branch_reparam",
            ),
        ),
    ),
    Family(
        "YOLOv7",
        ("*.rbr_dense.0.weight",),
        (REPCONV_YOLOV7, CONV_NORM),
        eps=1e-3,
        prefix="model.",
    ),
    Family(
        "YOLOv6",
        ("*.rbr_dense.conv.weight", "backbone.*", "detect.*"),
        (REPVGG, QA_REPVGG, TRANSPOSED_NORM, CONV_NORM),
        fused=("*.rbr_reparam.weight", "backbone.*", "detect.*"),
        eps=1e-3,
    ),
    Family(
        "mmyolo YOLOv6",
        ("*.rbr_dense.conv.weight", "bbox_head.*"),
        (REPVGG,),
        fused=("*.rbr_reparam.weight", "bbox_head.*"),
        eps=1e-3,
    ),
    Family("RepVGG", ("*rbr_dense.conv.weight",), (REPVGG, QA_REPVGG), fused=("*rbr_reparam.weight",)),
    Family("DBB", ("*dbb_origin.conv.weight",), (DBB,), fused=("*dbb_reparam.weight",)),
    Family("ACNet", ("*square_conv.weight", "*ver_conv.weight"), (ACNET,), fused=("*fused_conv.weight",)),
    Family(
        "UniRepLKNet",
        ("*lk_origin.weight", "*origin_bn.weight"),
        (
            Row(_chain(DILATED, Maybe(Norm("norm"))), "dwconv.lk_origin"),
            Row(_normed("", "dwconv", "norm"), "dwconv"),
            Row(_chain(Shift("act.1.beta"), Layer("pwconv2.0"), Norm("pwconv2.2"), Maybe(Scale("gamma"))), "pwconv2.0"),
        ),
        fused=("*lk_origin.weight", "*lk_origin.bias"),
    ),
    Family(
        "FastViT",
        ("*.mixer.rbr_conv.0.conv.weight", "*.norm.rbr_skip.weight"),
        (
            Row(
                _sum(
                    Identity(),
                    _chain(
                        _sum(
                            Each(_normed("mixer.rbr_conv.*")),
                            Maybe(_normed("mixer.rbr_scale")),
                            Maybe(Norm("mixer.rbr_skip")),
                            Minus(Norm("norm.rbr_skip")),
                        ),
                        Maybe(Scale("layer_scale")),
                    ),
                ),
                "reparam_conv",
            ),
            Row(_sum(Identity(), Layer("pe")), "reparam_conv"),
            MOBILEONE,
            LARGE_KERNEL,
        ),
        fused=("*.token_mixer.reparam_conv.weight", "*.lkb_reparam.weight"),
    ),
    Family("RepLKNet", ("*lkb_origin.conv.weight",), (LARGE_KERNEL,), fused=("*lkb_reparam.weight",)),
    Family("MobileOne", ("*rbr_conv.0.conv.weight",), (MOBILEONE,)),
    Family(
        "timm FastViT",
        ("*.mixer.conv_kxk.0.conv.weight", "*.norm.identity.weight"),
        (
            Row(
                _sum(
                    Identity(),
                    _chain(
                        _sum(
                            Each(_normed("mixer.conv_kxk.*")),
                            Maybe(_normed("mixer.conv_scale")),
                            Maybe(Norm("mixer.identity")),
                            Minus(Norm("norm.identity")),
                        ),
                        Maybe(Scale("layer_scale.gamma")),
                    ),
                ),
                "reparam_conv",
            ),
            Row(_sum(Identity(), Layer("pos_enc")), "reparam_conv"),
            Row(_sum(_normed("large_conv"), Maybe(_normed("small_conv"))), "reparam_conv"),
            MOBILEONE_TIMM,
        ),
    ),
    Family(
        "timm RepVGG and MobileOne",
        ("*conv_kxk.conv.weight|*conv_kxk.0.conv.weight", "*conv_1x1.conv.weight|*conv_scale.conv.weight"),
        (REPVGG_TIMM, MOBILEONE_TIMM),
        fused=("*reparam_conv.weight",),
    ),
    Family(
        "timm RepViT",
        ("*.token_mixer.conv.c.weight",),
        (
            Row(_chain(_sum(_normed("conv", "c", "bn"), _normed("conv1", "c", "bn"), Identity())), ""),
            Row(_chain(_sum(_normed("conv", "c", "bn"), Layer("conv1"), Identity()), Norm("bn")), ""),
            SHORT,
            TWO_HEADS,
            ONE_HEAD,
        ),
        fused=("stages.*.token_mixer.weight", "stages.*.token_mixer.bias", "*.channel_mixer.conv1.bias"),
    ),
    Family(
        "timm iFormer",
        ("*.cpe.module.c.weight",),
        (Row(_sum(Identity(), _normed("cpe.module", "c", "bn")), ""), SHORT, TWO_HEADS, ONE_HEAD),
        fused=("stages.*.mixer.module.v_gate.bias", "stages.*.blocks.*.weight"),
    ),
    Family(
        "timm SHViT",
        ("*.conv.m.c.weight", "*.m.qkv.c.weight"),
        (Row(_sum(Identity(), _normed("m", "c", "bn")), ""), SHORT, SHORT_HEAD),
        fused=("stages.*.mixer.m.qkv.bias", "stages.*.ffn.m.pw1.bias"),
    ),
    Family(
        "timm EfficientViT (MSRA)",
        ("*.mixer.m.attn.qkvs.0.conv.weight",),
        (CONV_NORM_LOST, LINEAR_HEAD),
        fused=("*.mixer.m.attn.qkvs.0.bias",),
    ),
    Family(
        "timm TinyViT",
        ("*.local_conv.conv.weight", "patch_embed.conv1.conv.weight"),
        (CONV_NORM_LOST,),
        fused=("*.local_conv.bias", "patch_embed.conv1.bias"),
    ),
    Family(
        "timm LeViT",
        ("stem.conv1.linear.weight", "*.attn.qkv.bn.weight|*.attn.qkv.linear.weight"),
        (
            # The head's norm comes before it; it alone has a bias of its own.
            Row(_chain(Norm("head.bn"), Layer("head.linear")), "head"),
            Row(_chain(Norm("head_dist.bn"), Layer("head_dist.linear")), "head_dist"),
            Row(_normed("", "linear", "bn"), ""),
        ),
        fused=("stem.conv1.bias", "*.attn.qkv.bias", "*.attention_biases"),
    ),
    Family(
        "timm EfficientViM",
        ("*.dwconv1.conv.weight", "*.mixer.BCdt_proj.conv.weight"),
        (
            _normed_residual("dwconv1", Scale("alpha", row=0, sigmoid=True)),
            _normed_residual("dwconv2", Scale("alpha", row=2, sigmoid=True)),
            _normed_residual("dwconv1"),
            _normed_residual("dwconv2"),
            Row(_normed("", "conv", "norm"), "conv"),
        ),
        fused=("*.dwconv1.conv.bias", "*.mixer.BCdt_proj.conv.weight"),
    ),
    Family(
        "timm GhostNetV3",
        ("*.primary_rpr_conv.0.conv.weight",),
        (_ghost("primary", "primary_conv.0"), _ghost("cheap", "cheap_operation.0"), _ghost("dw", "conv_dw")),
        fused=("*.ghost1.primary_conv.0.bias", "*.ghost1.cheap_operation.0.bias"),
    ),
    Family(
        "timm RepGhostNet",
        ("*.cheap_operation.0.weight", "*.fusion_bn.0.weight"),
        (
            Row(
                _sum(_normed("cheap_operation", "0", "1"), Each(Norm("fusion_bn.*"))),
                "cheap_operation",
            ),
        ),
        fused=("*.ghost1.cheap_operation.weight", "*.ghost1.cheap_operation.bias"),
    ),
    Family(
        "timm PP-LCNetV2",
        ("*.dw_conv_list.0.conv.weight",),
        (Row(_sum(Each(_normed("dw_conv_list.*"))), "dw_conv"),),
        fused=("stages.*.dw_conv.bias", "stages.*.pw_conv.*"),
    ),
    Family(
        "timm Next-ViT",
        ("*.e_mhsa.q.weight", "*.mlp.fc1.weight", "*.norm1.running_mean"),
        (
            Row(_chain(Norm("norm"), Layer("mlp.fc1")), "mlp.fc1"),
            Row(_chain(Norm("norm2"), Layer("mlp.fc1")), "mlp.fc1"),
            Row(_chain(Norm("norm1"), Layer("e_mhsa.q")), "e_mhsa.q"),
            Row(_chain(Norm("norm1"), Maybe(Norm("e_mhsa.norm")), Layer("e_mhsa.k")), "e_mhsa.k"),
            Row(_chain(Norm("norm1"), Maybe(Norm("e_mhsa.norm")), Layer("e_mhsa.v")), "e_mhsa.v"),
        ),
        fused=("*.e_mhsa.q.weight", "*.mhca.group_conv3x3.weight"),
    ),
    Family(
        "YOLO (ultralytics, YOLOv9)",
        ("*.cv1.conv.weight|*.ec.conv.weight", "*.bn.running_mean"),
        (REPVGG_DEPTHWISE, REPCONV, CONV2, TRANSPOSED_NORM, CONV_NORM),
        fused=("*.cv1.conv.bias|*.ec.conv.bias",),
        every="[0-9]*|model.[0-9]*",
        eps=1e-3,
        # Of two heads, fusing keeps the one-to-many, unless the model was told to use the other.
        twin="one2one_",
        prefix="model.",
    ),
)
"""Every family that weights alone are known by."""
