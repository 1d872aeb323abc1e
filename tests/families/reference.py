"""Small training and deploy forms of blocks whose repositories are no packages: structure from the papers, keys theirs.

Each training module computes its own branches; each deploy module is what the repository's deploy class has. They are
written for these tests alone, with no code of :mod:`repconv_cli`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn(
    inputs: int, outputs: int, kernel: int | tuple[int, int], *, names: str = "conv bn", **options: int
) -> nn.Sequential:
    """A convolution, centred, and a norm, under two names."""
    sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(options.get("dilation", 1) * (size - 1) // 2 for size in sizes)
    made = nn.Sequential()
    first, second = names.split()
    made.add_module(first, nn.Conv2d(inputs, outputs, sizes, padding=padding, bias=False, **options))
    made.add_module(second, nn.BatchNorm2d(outputs))
    return made


class RepVGG(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int = 1, stride: int = 1, names: str = "conv bn") -> None:
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, 3, names=names, groups=groups, stride=stride)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, names=names, groups=groups, stride=stride)
        if inputs == outputs and stride == 1:
            self.rbr_identity = nn.BatchNorm2d(inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return y + self.rbr_identity(x) if hasattr(self, "rbr_identity") else y


class QARepVGGYolo(nn.Module):
    """YOLOv6's: no norm on the 1x1, one after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(channels, channels, 3)
        self.rbr_1x1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.rbr_dense(x) + self.rbr_1x1(x) + x)


class QARepVGG(nn.Module):
    """super-gradients': with a weight on the 1x1, and an unused ``rbr_reparam`` beside the branches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch_3x3 = conv_bn(inputs, outputs, 3)
        self.branch_1x1 = nn.Conv2d(inputs, outputs, 1)
        self.alpha = nn.Parameter(torch.tensor([0.7]))
        self.post_bn = nn.BatchNorm2d(outputs)
        self.rbr_reparam = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.has_identity = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch_3x3(x) + self.alpha * self.branch_1x1(x)
        return self.post_bn(y + x if self.has_identity else y)


class MmRepVGG(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch_3x3 = conv_bn(channels, channels, 3)
        self.branch_1x1 = conv_bn(channels, channels, 1)
        self.branch_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch_3x3(x) + self.branch_1x1(x) + self.branch_norm(x)


class MmMobileOne(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.branch_conv_list = nn.ModuleList(conv_bn(channels, channels, 3, groups=groups) for _ in range(3))
        self.branch_scale = conv_bn(channels, channels, 1, groups=groups)
        self.branch_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x) for branch in self.branch_conv_list), self.branch_scale(x) + self.branch_norm(x))


class RepConv(nn.Module):
    """YOLOv9's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3)
        self.conv2 = conv_bn(inputs, outputs, 1)
        if inputs == outputs:
            self.bn = nn.BatchNorm2d(inputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x) + self.conv2(x)
        return y + self.bn(x) if hasattr(self, "bn") else y


class NormWithPadding(nn.Module):
    """A norm whose output is padded with what it makes of zero."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        edge = self.bn.bias - self.bn.running_mean * self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        y = functional.pad(self.bn(x), [self.width] * 4)
        for border in (slice(None, self.width), slice(-self.width, None)):
            y[:, :, border] = edge.reshape(-1, 1, 1)
            y[..., border] = edge.reshape(-1, 1, 1)
        return y


class IdentityConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        kernel = self.weight.clone()
        for channel in range(self.out_channels):
            kernel[channel, channel % kernel.shape[1]] += 1
        return functional.conv2d(x, kernel, groups=self.groups)


class DiverseBranches(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.dbb_origin = conv_bn(inputs, outputs, kernel, groups=groups)
        half, is_depthwise = kernel // 2, groups == outputs
        self.dbb_avg, self.dbb_1x1_kxk = nn.Sequential(), nn.Sequential()
        if not is_depthwise:
            self.dbb_1x1 = conv_bn(inputs, outputs, 1, groups=groups)
            self.dbb_avg.add_module("conv", nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False))
            self.dbb_avg.add_module("bn", NormWithPadding(outputs, half))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(kernel, 1, half if is_depthwise else 0))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(outputs))
        middle = 2 * inputs if is_depthwise else inputs
        first: nn.Module = nn.Conv2d(inputs, middle, 1, groups=groups, bias=False)
        if not is_depthwise:
            first = IdentityConv(inputs, inputs, 1, groups=groups, bias=False)
        self.dbb_1x1_kxk.add_module("conv1" if is_depthwise else "idconv1", first)
        self.dbb_1x1_kxk.add_module("bn1", NormWithPadding(middle, half))
        self.dbb_1x1_kxk.add_module("conv2", nn.Conv2d(middle, outputs, kernel, groups=groups, bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return y + self.dbb_1x1(x) if hasattr(self, "dbb_1x1") else y


class Asymmetric(nn.Module):
    """ACNet's: square, vertical and horizontal kernels."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        for name, size in (("square", (kernel, kernel)), ("ver", (kernel, 1)), ("hor", (1, kernel))):
            branch = conv_bn(inputs, outputs, size)
            self.add_module(f"{name}_conv", branch.conv)
            self.add_module(f"{name}_bn", branch.bn)

    def forward(self, x: Tensor) -> Tensor:
        names = ("square", "ver", "hor")
        return sum(getattr(self, f"{name}_bn")(getattr(self, f"{name}_conv")(x)) for name in names)  # type: ignore[return-value]


class LargeKernel(nn.Module):
    """RepLKNet's."""

    def __init__(self, channels: int, kernel: int = 13, small: int = 5) -> None:
        super().__init__()
        self.lkb_origin = conv_bn(channels, channels, kernel, groups=channels)
        self.small_conv = conv_bn(channels, channels, small, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.lkb_origin(x) + self.small_conv(x)


class Dilated(nn.Module):
    """UniRepLKNet's: parallel dilated convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(channels, channels, 9, padding=4, groups=channels, bias=False)
        self.origin_bn = nn.BatchNorm2d(channels)
        self.sizes = ((5, 1), (5, 2), (3, 3), (3, 4))
        for kernel, dilation in self.sizes:
            branch = conv_bn(channels, channels, kernel, groups=channels, dilation=dilation)
            self.add_module(f"dil_conv_k{kernel}_{dilation}", branch.conv)
            self.add_module(f"dil_bn_k{kernel}_{dilation}", branch.bn)

    def forward(self, x: Tensor) -> Tensor:
        y = self.origin_bn(self.lk_origin(x))
        for kernel, dilation in self.sizes:
            conv, norm = (getattr(self, f"dil_{part}_k{kernel}_{dilation}") for part in ("conv", "bn"))
            y = y + norm(conv(x))
        return y


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    def __init__(self, channels: int, *, has_shift: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, channels))
        if has_shift:
            self.beta = nn.Parameter(torch.randn(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        y = (self.gamma * size / (size.mean(-1, keepdim=True) + 1e-6) + 1) * x
        return y + self.beta if hasattr(self, "beta") else y


class UniRepLKBlock(nn.Module):
    """The whole block: what follows the large kernel folds as well."""

    def __init__(self, channels: int, *, deploy: bool = False) -> None:
        super().__init__()
        wide = 2 * channels
        self.dwconv: nn.Module = Dilated(channels)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        if deploy:
            self.dwconv = Under("lk_origin", nn.Conv2d(channels, channels, 9, padding=4, groups=channels))
            self.norm = nn.Identity()
        self.pwconv1 = nn.Sequential(ChannelsLast(), nn.Linear(channels, wide))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(wide, has_shift=not deploy))
        self.pwconv2 = nn.Sequential(nn.Linear(wide, channels, bias=deploy), ChannelsFirst())
        if not deploy:
            self.pwconv2.append(nn.BatchNorm2d(channels))
            self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv2(self.act(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + (self.gamma.reshape(-1, 1, 1) * y if hasattr(self, "gamma") else y)


class MobileOne(nn.Module):
    """Apple's."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, groups: int = 1, branches: int = 2) -> None:
        super().__init__()
        self.rbr_conv = nn.ModuleList(conv_bn(inputs, outputs, kernel, groups=groups) for _ in range(branches))
        if kernel > 1:
            self.rbr_scale = conv_bn(inputs, outputs, 1, groups=groups)
        if inputs == outputs:
            self.rbr_skip = nn.BatchNorm2d(inputs)

    def forward(self, x: Tensor) -> Tensor:
        extra = [getattr(self, name) for name in ("rbr_scale", "rbr_skip") if hasattr(self, name)]
        return sum(branch(x) for branch in (*self.rbr_conv, *extra))  # type: ignore[return-value]


class FastViTMixer(nn.Module):
    """Apple's token mixer, inside a block of one name."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token_mixer = nn.Module()
        self.token_mixer.mixer = MobileOne(channels, channels, 3, groups=channels, branches=1)
        self.token_mixer.norm = nn.Module()
        self.token_mixer.norm.rbr_skip = nn.BatchNorm2d(channels)
        self.token_mixer.layer_scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        part = self.token_mixer
        return x + part.layer_scale * (part.mixer(x) - part.norm.rbr_skip(x))


class PositionalEncoding(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe(x)


class Under(nn.Module):
    """Deploy form: one convolution under a path."""

    def __init__(self, path: str, conv: nn.Conv2d) -> None:
        super().__init__()
        holder: nn.Module = self
        *folders, name = path.split(".")
        for folder in folders:
            holder.add_module(folder, nn.Module())
            holder = getattr(holder, folder)
        holder.add_module(name, conv)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.path)(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A family's blocks in a row, in training and in deploy form, with keys as in its own repository."""

    family: str
    training: Callable[[], nn.Module]
    deploy: Callable[[], nn.Module]
    channels: int = 8
    eps: float = 1e-5


def one(path: str, inputs: int = 8, outputs: int = 8, kernel: int = 3, **options: int) -> Under:
    return Under(path, nn.Conv2d(inputs, outputs, kernel, padding=(kernel - 1) // 2, **options))


def named(**blocks: nn.Module) -> nn.Module:
    """Blocks one after the other, a ReLU after each, under names of their own (dots as double underscores)."""
    model = nn.Sequential()
    for name, block in blocks.items():
        model.add_module(name, block)
    return model


CASES = (
    Case(
        "RepVGG",
        lambda: named(stage0=RepVGG(8, 8), stage1=RepVGG(8, 12, stride=2), stage2=RepVGG(12, 12, groups=2)),
        lambda: named(
            stage0=one("rbr_reparam"),
            stage1=one("rbr_reparam", 8, 12, stride=2),
            stage2=one("rbr_reparam", 12, 12, groups=2),
        ),
    ),
    Case(
        "YOLOv6",
        lambda: named(backbone=named(a=RepVGG(8, 8), b=QARepVGGYolo(8)), detect=conv_bn(8, 8, 1)),
        lambda: named(
            backbone=named(a=one("rbr_reparam"), b=one("rbr_reparam")), detect=Under("conv", nn.Conv2d(8, 8, 1))
        ),
        eps=1e-3,
    ),
    Case(
        "YOLOv7",
        lambda: named(a=RepVGG(8, 8, names="0 1"), b=conv_bn(8, 8, 3)),
        lambda: named(a=one("rbr_reparam"), b=one("conv")),
        eps=1e-3,
    ),
    Case(
        "YOLO (ultralytics, YOLOv9)",
        lambda: nn.Sequential(conv_bn(8, 8, 3), RepConv(8, 8), RepConv(8, 12), named(cv1=conv_bn(12, 12, 1))),
        lambda: nn.Sequential(one("conv"), one("conv"), one("conv", 8, 12), one("cv1.conv", 12, 12, 1)),
        eps=1e-3,
    ),
    Case(
        "DBB",
        lambda: named(a=DiverseBranches(8, 12), b=DiverseBranches(12, 12, groups=12), c=DiverseBranches(12, 8, 2, 5)),
        lambda: named(
            a=one("dbb_reparam", 8, 12),
            b=one("dbb_reparam", 12, 12, groups=12),
            c=one("dbb_reparam", 12, 8, 5, groups=2),
        ),
    ),
    Case(
        "ACNet",
        lambda: named(a=Asymmetric(8, 12), b=Asymmetric(12, 8, 5)),
        lambda: named(a=one("fused_conv", 8, 12), b=one("fused_conv", 12, 8, 5)),
    ),
    Case("RepLKNet", lambda: named(a=LargeKernel(8)), lambda: named(a=one("lkb_reparam", 8, 8, 13, groups=8))),
    Case("UniRepLKNet", lambda: named(a=UniRepLKBlock(8)), lambda: named(a=UniRepLKBlock(8, deploy=True))),
    Case(
        "MobileOne",
        lambda: named(a=MobileOne(8, 12), b=MobileOne(12, 12, groups=12), c=MobileOne(12, 12, 1)),
        lambda: named(
            a=one("reparam_conv", 8, 12), b=one("reparam_conv", 12, 12, groups=12), c=one("reparam_conv", 12, 12, 1)
        ),
    ),
    Case(
        "FastViT",
        lambda: named(a=FastViTMixer(8), b=PositionalEncoding(8), c=LargeKernel(8, 7, 3), d=MobileOne(8, 8)),
        lambda: named(
            a=one("token_mixer.reparam_conv", groups=8),
            b=one("reparam_conv", kernel=7, groups=8),
            c=one("lkb_reparam", kernel=7, groups=8),
            d=one("reparam_conv"),
        ),
    ),
    Case("mmpretrain RepVGG", lambda: named(a=MmRepVGG(8)), lambda: named(a=one("branch_reparam"))),
    Case(
        "mmpretrain MobileOne",
        lambda: named(a=MmMobileOne(8, 8), b=MmMobileOne(8, 2)),
        lambda: named(a=one("branch_reparam", groups=8), b=one("branch_reparam", groups=2)),
    ),
    Case(
        "super-gradients QARepVGG",
        lambda: named(a=QARepVGG(8, 8), b=QARepVGG(8, 12)),
        lambda: named(a=one("rbr_reparam"), b=one("rbr_reparam", 8, 12)),
    ),
)


def drawn(model: nn.Module, eps: float, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with parameters and statistics that hide nothing: negative gammas, a tiny variance."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = eps
            nn.init.normal_(part.weight, 0, 1, generator)
            nn.init.normal_(part.bias, 0, 1, generator)
            part.running_mean.normal_(0, 1, generator=generator)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
            part.running_var[0] = 1e-3  # type: ignore[index]
    return model.eval()


def assert_equal_outputs(model: nn.Module, deploy: nn.Module, channels: int, limit: float = 1e-5) -> None:
    x = torch.randn(2, channels, 11, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # In float64, so that what is seen is the rounding of the stored tensors and no more.
        expected, found = (copy.deepcopy(m).double().eval()(x.double()) for m in (model, deploy))
    assert float((found - expected).abs().max()) <= limit * float(expected.abs().max())
