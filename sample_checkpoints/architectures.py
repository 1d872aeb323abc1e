"""The sample networks, each a callable without arguments: ``--arch sample_checkpoints/architectures.py:NAME``.

All take images ``(N, 1, 8, 8)`` and give logits ``(N, 10)``.
"""

from __future__ import annotations

from torch import Tensor, nn

from repconv_cli.training import RepConv, ScaledDropout


def repvgg_digits() -> nn.Sequential:
    """Return a RepVGG-style network: 3x3 + 1x1 + identity, a batch norm after each branch."""
    return _repvgg(norm=True)


def repvgg_plain_digits() -> nn.Sequential:
    """Return the same network without norms: the convs have biases, the identity branch is the input itself."""
    return _repvgg(norm=False)


def grouped_digits() -> nn.Sequential:
    """Return a network of grouped convs, whose test-time dropout scale stands before a conv."""
    return nn.Sequential(
        RepConv(1, 16),
        nn.ReLU(),
        RepConv(16, 16, groups=2),
        nn.ReLU(),
        RepConv(16, 32, stride=2, groups=4),
        nn.ReLU(),
        ScaledDropout(0.2),
        RepConv(32, 32, groups=4),
        nn.ReLU(),
        RepConv(32, 32, kernel_size=1, pointwise=False),
        nn.ReLU(),
        *_head(32),
    )


class MobileOneDigits(nn.Module):
    """A MobileOne-style network with a forward of its own: depthwise blocks, each followed by a pointwise block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = RepConv(1, 24, num_conv_branches=2)
        self.blocks = nn.ModuleList(
            [
                DepthwiseSeparable(24, 24),
                DepthwiseSeparable(24, 48, stride=2),
                DepthwiseSeparable(48, 48),
            ]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.dropout(self.pool(x).flatten(1)))
        return logits


class DepthwiseSeparable(nn.Module):
    """A depthwise 3x3 block (three convs, a 1x1, the identity), then a pointwise block (three convs, the identity)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = RepConv(in_channels, in_channels, stride=stride, groups=in_channels, num_conv_branches=3)
        self.dropout = ScaledDropout(0.1)
        self.pointwise = RepConv(in_channels, out_channels, kernel_size=1, num_conv_branches=3, pointwise=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after both blocks, each with a ReLU behind it."""
        x = self.dropout(self.depthwise(x).relu())
        return self.pointwise(x).relu()  # type: ignore[no-any-return]


def mobileone_digits() -> MobileOneDigits:
    """Return the MobileOne-style network."""
    return MobileOneDigits()


def _repvgg(*, norm: bool) -> nn.Sequential:
    return nn.Sequential(
        RepConv(1, 16, norm=norm),
        nn.ReLU(),
        RepConv(16, 16, norm=norm),
        nn.ReLU(),
        RepConv(16, 32, stride=2, norm=norm),
        nn.ReLU(),
        nn.Dropout(0.1),
        RepConv(32, 32, norm=norm),
        nn.ReLU(),
        RepConv(32, 32, norm=norm),
        nn.ReLU(),
        *_head(32),
    )


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, 10)]
