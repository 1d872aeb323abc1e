"""A block of a file as a module made of ``torch.nn`` parts, in float64.

Strides and paddings are in no file. Neither changes the one kernel as long as every branch has the same stride and its
kernel lies centred on that of the largest one; so all have stride 1 here, and a padding of half their extent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from repconv_cli.checkpoint.families.find import NORM_KEYS, FamilyBlock
from repconv_cli.checkpoint.families.parts import (
    Chain,
    Identity,
    Layer,
    Minus,
    Norm,
    Part,
    Pool,
    Scale,
    Shift,
    Sum,
    leaves,
)
from repconv_cli.checkpoint.families.shapes import groups_of, input_channels, main_layer

Eps = Callable[[str], float]
"""The eps of the norm at a path."""

_LAYERS: dict[int, Any] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_POOLS: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Branches(nn.Module):
    """The sum of branches, each with its sign; divided by ``divisor``."""

    def __init__(self, branches: Sequence[nn.Module], signs: Sequence[int], divisor: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.signs, self.divisor = tuple(signs), divisor

    def extra_repr(self) -> str:
        """Return what tells one such sum from another."""
        return f"signs={self.signs}, divisor={self.divisor}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        total: Tensor = self.branches[0](x)
        for branch, sign in zip(self.branches[1:], self.signs[1:], strict=True):
            total = total + branch(x) if sign > 0 else total - branch(x)
        return total if self.divisor == 1 else total / self.divisor


class PerChannel(nn.Module):
    """``x · value`` or ``x + value``, one value for each channel or one for all."""

    def __init__(self, value: Tensor, dims: int, *, is_shift: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(value.reshape(-1, *(1,) * dims), requires_grad=False)
        self.is_shift = is_shift

    def extra_repr(self) -> str:
        """Return what tells one from another."""
        return f"{tuple(self.value.shape)}, is_shift={self.is_shift}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled or shifted input."""
        return x + self.value if self.is_shift else x * self.value


class PaddedFirst(nn.Module):
    """A chain with more than one kernel: padded once, before it, so that its own layers need no padding."""

    def __init__(self, chain: nn.Module, padding: tuple[int, ...]) -> None:
        super().__init__()
        self.chain, self.padding = chain, padding

    def extra_repr(self) -> str:
        """Return what tells one from another."""
        return f"padding={self.padding}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the chain's output."""
        return self.chain(functional.pad(x, self.padding))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rebuilt:
    """A block as a module, and the shape of an input that it takes."""

    module: nn.Module
    example: tuple[int, ...]


def rebuild_block(block: FamilyBlock, tensors: Mapping[str, Tensor], eps: Eps) -> Rebuilt:
    """Return ``block`` as a module in eval mode that holds ``tensors``: weights as they are, all else in float64."""
    shapes = {key: tuple(tensors[key].shape) for key in block.sources}
    weight = shapes[f"{main_layer(block.part).path}.weight"]
    builder = _Builder(tensors, eps, groups_of(block.part, shapes), weight)
    module = builder.make(block.part).eval()
    channels = input_channels(block.part, shapes)
    # Odd, and of another size along each axis, so that no two axes can be taken for each other.
    sizes = (size + 4 + 2 * axis for axis, size in enumerate(weight[2:]))
    return Rebuilt(module, (2, channels, *sizes))


class _Builder:
    def __init__(self, tensors: Mapping[str, Tensor], eps: Eps, groups: int, weight: tuple[int, ...]) -> None:
        self.tensors, self.eps, self.groups = tensors, eps, groups
        self.kernel, self.dims, self.outputs = weight[2:], len(weight) - 2, weight[0]

    def make(self, part: Part, *, is_padded: bool = True) -> nn.Module:
        """Return the module of ``part``; ``is_padded`` keeps the size."""
        if isinstance(part, Chain):
            return self._chain(part, is_padded)
        if isinstance(part, Sum):
            signs = [-1 if isinstance(branch, Minus) else 1 for branch in part.branches]
            branches = [self.make(b.part if isinstance(b, Minus) else b) for b in part.branches]
            return Branches(branches, signs, len(branches) if part.mean else 1)
        if isinstance(part, Layer):
            return self._layer(part, is_padded)
        if isinstance(part, Norm):
            return self._norm(part)
        if isinstance(part, (Scale, Shift)):
            return PerChannel(self._value(part), self.dims, is_shift=isinstance(part, Shift))
        if isinstance(part, Pool):
            padding = self._half(self.kernel) if is_padded else (0,) * self.dims
            return cast(nn.Module, _POOLS[self.dims](self.kernel, stride=1, padding=padding))
        assert isinstance(part, Identity)
        return nn.Identity()

    def _chain(self, chain: Chain, is_padded: bool) -> nn.Module:
        if len(chain.parts) == 1:
            return self.make(chain.parts[0], is_padded=is_padded)
        kernels = sum(isinstance(leaf, (Layer, Pool)) for leaf in leaves(chain))
        is_branch = not any(isinstance(part, Sum) for part in chain.parts)
        if kernels < 2 or not is_branch or not self.dims:
            return nn.Sequential(*(self.make(part, is_padded=is_padded) for part in chain.parts))
        inner = nn.Sequential(*(self.make(part, is_padded=False) for part in chain.parts))
        padding = tuple(half for half in reversed(self._half(self.kernel)) for _ in range(2))
        return PaddedFirst(inner, padding) if is_padded else inner

    def _half(self, kernel: tuple[int, ...], dilation: int = 1) -> tuple[int, ...]:
        return tuple(dilation * (size - 1) // 2 for size in kernel)

    def _layer(self, layer: Layer, is_padded: bool) -> nn.Module:
        # The largest of all: whoever computes with it makes it float64.
        weight = self.tensors[f"{layer.path}.weight"].detach()
        bias = self._double(f"{layer.path}.bias") if f"{layer.path}.bias" in self.tensors else None
        kernel = tuple(weight.shape[2:])
        if layer.adds_identity:
            weight = weight.double() + _identity(tuple(weight.shape))
        with torch.device("meta"):
            made = self._empty_layer(layer, tuple(weight.shape), kernel, is_padded, bias is not None)
        _set(made, {"weight": weight, "bias": bias})
        return made

    def _empty_layer(
        self, layer: Layer, shape: tuple[int, ...], kernel: tuple[int, ...], is_padded: bool, has_bias: bool
    ) -> nn.Module:
        made: nn.Module
        if not self.dims:
            return nn.Linear(shape[1], shape[0], bias=has_bias)
        if layer.transposed:
            # A transposed convolution without padding keeps its whole output, and its kernel is what it is.
            outputs = shape[1] * self.groups
            made = _TRANSPOSED[self.dims](shape[0], outputs, kernel, groups=self.groups, bias=has_bias)
            return made
        dilation = _last_number(layer.path) if layer.dilated else 1
        padding = self._half(kernel, dilation) if is_padded else 0
        inputs = shape[1] * self.groups
        made = _LAYERS[self.dims](inputs, shape[0], kernel, 1, padding, dilation, self.groups, has_bias)
        return made

    def _norm(self, norm: Norm) -> nn.Module:
        tensors = {n: self._double(f"{norm.path}.{n}") for n in NORM_KEYS if f"{norm.path}.{n}" in self.tensors}
        with torch.device("meta"):
            made = _NORMS[self.dims](
                len(tensors["running_var"]), eps=self.eps(norm.path), affine="weight" in tensors or "bias" in tensors
            )
        # It only counts training batches.
        made._buffers["num_batches_tracked"] = None
        if made.affine:
            channels = len(tensors["running_var"])
            tensors.setdefault("weight", torch.ones(channels, dtype=torch.float64))
            tensors.setdefault("bias", torch.zeros(channels, dtype=torch.float64))
        _set(made, tensors)
        return made

    def _value(self, part: Scale | Shift) -> Tensor:
        value = self._double(part.key)
        if isinstance(part, Scale) and part.row is not None:
            value = value[part.row]
        return value.sigmoid() if isinstance(part, Scale) and part.sigmoid else value

    def _double(self, key: str) -> Tensor:
        return self.tensors[key].detach().to(torch.float64)


def _set(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        else:
            module._buffers[name] = tensor.contiguous()


def _identity(shape: tuple[int, ...]) -> Tensor:
    """Return the kernel that gives each channel to itself: 1 at ``[i, i % (I / groups)]``, in the middle."""
    kernel = torch.zeros(shape, dtype=torch.float64)
    middle = tuple(size // 2 for size in shape[2:])
    for channel in range(shape[0]):
        kernel[(channel, channel % shape[1], *middle)] = 1
    return kernel


def _last_number(path: str) -> int:
    digits = path[len(path.rstrip("0123456789")) :]
    return int(digits)
