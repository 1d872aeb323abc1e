"""Checks on tensors once they are read: of a kind that can be fused, finite, and not more than the file has."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError
from repconv_cli.finite import is_finite

_RELEASED_AFTER_BYTES = 32 << 20


def check_module(module: nn.Module) -> None:
    """Check that a module can list its parts, and every parameter and buffer of it.

    Raises:
        DamagedFileError: one of its parts lacks what every module has, as only a file can have it.
        InputError: a tensor is not an ordinary dense one, or holds NaN or infinity.
    """
    try:
        for part in module.modules():
            _ = part.training
        module.state_dict()
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise DamagedFileError(f"its modules lack what every module has ({type(error).__name__})") from None
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        _check_tensor(name, tensor.detach())


def check_values(
    tensors: Mapping[str, torch.Tensor],
    file_bytes: int,
    release: Callable[[], None] | None = None,
    *,
    are_proven: bool = False,
) -> None:
    """Check tensors by name, read from a file of ``file_bytes`` bytes.

    ``release`` is called now and then: it may let go of the memory of those that were checked. ``are_proven`` says
    that a graph is with them, whose outputs were compared: an infinite value among them is one that it is to have.

    Raises:
        InputError: one is not an ordinary dense tensor, or holds NaN or infinity.
        DamagedFileError: together, they show many times more bytes than the file has.
    """
    shown = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # Tied weights show the same bytes a few times.
    allowed = (64 << 20) + 16 * file_bytes
    if shown > allowed:
        raise DamagedFileError(f"its tensors show {shown} bytes in a file of {file_bytes}", needed=f"at most {allowed}")
    unreleased = 0
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, may_be_infinite=are_proven)
        unreleased += tensor.numel() * tensor.element_size()
        if release is not None and unreleased > _RELEASED_AFTER_BYTES:
            release()
            unreleased = 0


def _check_tensor(name: str, tensor: torch.Tensor, *, may_be_infinite: bool = False) -> None:
    shown = quoted(name)
    if tensor.is_meta:
        raise InputError(f"tensor {shown} is on the meta device and has no values")
    if tensor.is_quantized or tensor.layout is not torch.strided:
        raise InputError(f"tensor {shown} is quantized or sparse", needed="ordinary dense tensors of numbers")
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    if is_finite(tensor):
        return
    values = tensor if tensor.element_size() > 1 else tensor.to(torch.float32)
    if not values.isnan().any() and (may_be_infinite or _is_mask(values)):
        return
    bad = values.numel() - int(torch.isfinite(values).sum())
    raise InputError(
        f"tensor {shown} holds {bad} values of {values.numel()} that are NaN or infinite",
        hint="The weights were damaged in training; take an earlier checkpoint.",
    )


def _is_mask(values: torch.Tensor) -> bool:
    """Whether all values but infinite ones are one and the same, as in what attention adds to what it may not see."""
    finite = values[values.isfinite()]
    return bool(finite.numel()) and bool((finite == finite[0]).all())
