"""A model made from a file's description, which may lie about its size: it is stopped when it outgrows its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from repconv_cli.errors import DamagedFileError

_SPARE_VALUES = 64 << 20
_SPARE_PARTS = 10_000


@contextmanager
def no_larger_than(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop any module that is made in the block once it has far more parameters, or parts, than ``tensors``.

    A parameter is counted when it is registered, before its values are: memory that nothing has written to costs none.

    Raises:
        DamagedFileError: it does.
    """
    most_values = 4 * sum(tensor.numel() for tensor in tensors.values()) + _SPARE_VALUES
    most_parts = 20 * len(tensors) + _SPARE_PARTS
    values = parts = 0

    def count_parameter(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal values
        values += parameter.numel() if parameter is not None else 0
        if values > most_values:
            _refuse(f"{values} values in its parameters", f"at most {most_values} for these weights")

    def count_part(module: nn.Module, name: str, part: nn.Module | None) -> None:
        nonlocal parts
        parts += 1
        if parts > most_parts:
            _refuse(f"more than {most_parts} parts", f"a model of these {len(tensors)} tensors")

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_part),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse(found: str, needed: str) -> None:
    raise DamagedFileError(f"config.json describes a model with {found}", needed=needed)
