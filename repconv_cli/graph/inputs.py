"""Example inputs: from the user's shapes, or guessed from the first layer that has weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from repconv_cli.errors import InputError
from repconv_cli.graph.allowance import largest_tensor, require_within
from repconv_cli.graph.program import LEAF, InputInfo, Structure

# Sizes that published models take, the usual one first; one channel is most often a digit or a spectrogram.
_SIZES_COLOUR = (224, 256, 384, 32, 64, 299, 512, 640, 28, 128, 96, 160, 16, 8)
_SIZES_GRAY = (28, 32, 64, 224, 128, 8, 16, 256)
_LENGTHS = (128, 256, 1024, 64, 16000, 32)


NO_KEYWORDS = Structure("dict")


@dataclass(frozen=True)
class Example:
    """What a module is traced with: its tensors in order, and how they nest; ``values`` if the user gave them."""

    infos: tuple[InputInfo, ...]
    arguments: Structure
    keywords: Structure = NO_KEYWORDS
    values: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
        """Return the call ``module(*args, **kwargs)`` as an example: tensors, nested in tuples, lists and dicts.

        A batch of 1, which a trace would fix, is given twice.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise InputError(f"an example input is a {type(leaf).__name__}", needed="tensors")
        if all(leaf.ndim and leaf.shape[0] == 1 for leaf in leaves):
            leaves = [torch.cat([leaf, leaf]) for leaf in leaves]
        infos = tuple(
            InputInfo(f"input_{i}", (None,) * leaf.ndim, tuple(leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)
        )
        arguments, keywords = Structure.of(spec).children
        return cls(infos, arguments, keywords, tuple(leaf.detach() for leaf in leaves))

    @classmethod
    def positional(cls, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Example:
        """Return one positional tensor per shape, with a batch of at least 2: a batch of 1 would be fixed."""
        grown = [(max(shape[0], 2), *shape[1:]) for shape in shapes]
        infos = tuple(InputInfo(f"input_{i}", (None,) * len(s), s, dtype) for i, s in enumerate(grown))
        return cls(infos, Structure("tuple", (LEAF,) * len(infos)))

    @classmethod
    def keyword(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Example:
        """Return one tensor given by the keyword ``name``, with a batch of at least 2."""
        info = cls.positional((shape,), dtype).infos[0]
        return cls((replace(info, name=name),), Structure("tuple"), Structure("dict", (LEAF,), (name,)))

    def of_one_sample(self) -> Example:
        """Return the same call with a batch of 1."""
        return replace(self, infos=tuple(replace(info, example=(1, *info.example[1:])) for info in self.infos))

    def tensors(self) -> tuple[Any, Any]:
        """Return (positional arguments, keyword arguments): the user's values, else noise."""
        generator = torch.Generator().manual_seed(0)
        leaves = iter(self.values or [_noise(info, generator) for info in self.infos])
        return self.arguments.unflatten(leaves), self.keywords.unflatten(leaves)


def _noise(info: InputInfo, generator: torch.Generator) -> Tensor:
    if info.dtype.is_floating_point:
        return torch.randn(info.example, generator=generator, dtype=torch.float32).to(info.dtype)
    return torch.ones(info.example, dtype=info.dtype)


def guess_shape(module: nn.Module, dtype: torch.dtype, most: int, keyword: str | None = None) -> tuple[int, ...]:
    """Return an input shape that ``module`` takes, from its first layer; raise :class:`InputError` if none fits.

    It is given by ``keyword`` if that is set. No tensor that the module makes of it has more than ``most`` elements.
    """
    first = next(
        (m for m in module.modules() if isinstance(m, (_ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm))), None
    )
    candidates = _candidates(first)
    found = 0
    for shape in candidates:
        largest = largest_tensor(module, shape, dtype, keyword)
        if largest is not None and max(largest, math.prod(shape)) <= most:
            return shape
        found = max(found, largest or 0)
    if found:
        require_within("the model", found, most)
    tried = f"tried {', '.join('×'.join(map(str, s)) for s in candidates[:4])} …" if candidates else "no layer tells it"
    raise InputError(f"the input shape cannot be guessed ({tried})", hint="Give it, such as --input 1,3,224,224.")


def _candidates(first: nn.Module | None) -> list[tuple[int, ...]]:
    channels = _channels(first)
    if channels is None:
        return []
    if isinstance(first, _ConvNd):
        sizes = _SIZES_GRAY if channels == 1 else _SIZES_COLOUR
        dims = first.weight.ndim - 2 if isinstance(first.weight, Tensor) else 2
        if dims == 1:
            return [(2, channels, length) for length in _LENGTHS]
        if dims == 2:
            return [(2, channels, size, size) for size in sizes]
        return [(2, channels, depth, size, size) for depth, size in ((16, 112), (8, 64), (8, 32), (4, 16))]
    if isinstance(first, nn.Linear):
        return [(2, channels), (2, 16, channels)]
    return [(2, channels, size, size) for size in (32, 224, 8)] + [(2, channels), (2, channels, 64)]


def _channels(first: nn.Module | None) -> int | None:
    """Return how many channels a layer takes; None where it does not say so with a number, as a file may have it."""
    name = "in_channels" if isinstance(first, _ConvNd) else "in_features" if isinstance(first, nn.Linear) else None
    found = getattr(first, name or "num_features", None)
    return found if isinstance(found, int) else None
