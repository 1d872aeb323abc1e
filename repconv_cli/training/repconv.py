"""The training-time block: parallel convolutions that are one convolution once trained."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from repconv_cli.errors import InputError

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class RepConv(nn.Module):
    """Return the sum of parallel branches that read one input: k x k convs, a pointwise conv, the input itself.

    With ``N_i`` the batch norm of branch i, ``W_i`` the k x k kernels and ``P`` the pointwise kernel::

        y = sum_i N_i(W_i * x)  +  N_p(P * x)  +  N_0(x)

    With ``norm=False`` every ``N`` is left out, the convs get biases, and the identity branch is ``x`` itself.
    There is no activation inside, so the block is affine in eval mode.

    Shapes: ``x (N, in_channels, H, W)``, ``y (N, out_channels, H', W')`` with H' as in :class:`torch.nn.Conv2d`;
    ``W_i (out_channels, in_channels/groups, KH, KW)``, ``P (out_channels, in_channels/groups, 1, 1)``.

    The pointwise kernel lies over the middle of the k x k kernel: with padding ``p - dilation * (k - 1) / 2`` it gives
    the same output grid. Where that is negative or not whole no pointwise conv has this grid, and asking for one is
    an error. The identity branch needs ``in_channels == out_channels``, stride 1 and ``2 p == dilation * (k - 1)``.

    Args:
        in_channels: channels of ``x``.
        out_channels: channels of ``y``.
        kernel_size: k, one for both axes or (KH, KW).
        stride: as in ``Conv2d``, for every branch.
        padding: as in ``Conv2d``; None is ``dilation * (k // 2)``, which keeps the size for an odd k and stride 1.
        dilation: as in ``Conv2d``, for the k x k convs.
        groups: as in ``Conv2d``, for the k x k and the pointwise convs.
        padding_mode: as in ``Conv2d``, for every conv that pads.
        num_conv_branches: how many k x k convs there are.
        pointwise: whether there is a pointwise branch.
        identity: whether there is an identity branch; None adds it wherever it is possible.
        norm: whether a batch norm follows every branch.

    Raises:
        InputError: ``num_conv_branches`` is under 1, or a branch that was asked for cannot have the output grid.

    Reference:
        Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.
        Vasu et al., "MobileOne: An Improved One millisecond Mobile Backbone", CVPR 2023, section 3.2.

    Example:
        >>> import torch
        >>> block = RepConv(4, 4, num_conv_branches=2).eval()
        >>> block(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
        >>> [name for name, _ in block.named_parameters() if name.startswith(("convs.1", "identity"))]
        ['convs.1.conv.weight', 'convs.1.norm.weight', 'convs.1.norm.bias', 'identity.weight', 'identity.bias']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        *,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        num_conv_branches: int = 1,
        pointwise: bool = True,
        identity: bool | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if num_conv_branches < 1:
            raise InputError(f"num_conv_branches is {num_conv_branches}", needed="at least 1")
        if padding is None:
            padding = _same_padding(_pair(kernel_size), _pair(dilation))
        excess = _excess(_pair(kernel_size), _pair(padding), _pair(dilation))
        is_possible = in_channels == out_channels and _pair(stride) == (1, 1) and excess == (0, 0)
        if identity and not is_possible:
            raise InputError(
                f"no identity branch from {in_channels} to {out_channels} channels with stride {_pair(stride)} "
                f"and an output {excess} larger than the input",
                needed="equal channels, stride 1 and an output of the input's size",
            )

        def conv(size: Size, padding: Size, dilation: Size = 1) -> nn.Conv2d:
            bias = not norm
            return nn.Conv2d(in_channels, out_channels, size, stride, padding, dilation, groups, bias, padding_mode)

        convs = [conv(kernel_size, padding, dilation) for _ in range(num_conv_branches)]
        self.convs = nn.ModuleList([_normed(conv) if norm else conv for conv in convs])
        self.pointwise: nn.Module | None = None
        if pointwise:
            middle = conv(1, _pointwise_padding(excess))
            self.pointwise = _normed(middle) if norm else middle
        self.identity: nn.Module | None = None
        if is_possible and identity is not False:
            self.identity = nn.BatchNorm2d(in_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches at ``x``, a new tensor."""
        total: Tensor = self.convs[0](x)
        for conv in self.convs[1:]:
            total = total + conv(x)
        if self.pointwise is not None:
            total = total + self.pointwise(x)
        if self.identity is not None:
            total = total + self.identity(x)
        return total


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(conv.out_channels)))


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    return (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))


def _excess(kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Return how much larger than its input the output of a k x k conv of stride 1 is, per axis."""
    return (2 * padding[0] - dilation[0] * (kernel[0] - 1), 2 * padding[1] - dilation[1] * (kernel[1] - 1))


def _pointwise_padding(excess: tuple[int, int]) -> tuple[int, int]:
    """Return the padding with which a pointwise conv has the k x k conv's grid: half its excess over the input."""
    if any(size < 0 or size % 2 for size in excess):
        raise InputError(
            f"no pointwise branch fits a conv whose output is {excess} larger than its input",
            needed="an excess 2 * padding - dilation * (kernel_size - 1) that is even and not negative, per axis",
            hint="Choose another padding, or pointwise=False.",
        )
    return (excess[0] // 2, excess[1] // 2)
