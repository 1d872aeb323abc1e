"""Fuse a module through the whole graph pass, and compare with the module itself in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs

TOLERANCE = 1e-10


def noise(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def fused(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, is_spatial_free: bool = True
) -> Fused:
    """Return ``module`` fused. Free spatial sizes cost most of torch.export's time: only where they matter."""
    may_vary = None if is_spatial_free else tuple((True, *(False,) * (arg.ndim - 1)) for arg in args)
    program = trace(module, args, kwargs, may_vary=may_vary)
    return fuse_program(program, random_inputs(program, 1, 0))


def in_float64(program: Program) -> nn.Module:
    """Return ``program`` as a module, every floating tensor in float64."""
    tensors = {key: t.double() if t.is_floating_point() else t for key, t in program.tensors.items()}
    return ProgramModule(replace(program, tensors=tensors))


def difference(
    module: nn.Module, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> float:
    """Return the largest difference between ``module`` and ``program``, both in float64, relative to the outputs.

    The outputs must nest alike and have equal shapes. ``module`` is copied, and put in eval mode.
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.double, (args, kwargs or {}))
    with torch.no_grad():
        expected = copy.deepcopy(module).double().eval()(*args, **kwargs)
        found = in_float64(program)(*args, **kwargs)
    before, nesting = pytree.tree_flatten(expected)
    after, found_nesting = pytree.tree_flatten(found)
    assert nesting == found_nesting
    return max(_relative(a, b) for a, b in zip(before, after, strict=True))


def _relative(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    assert torch.isfinite(expected).all()
    assert torch.isfinite(found).all()
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return error / scale if scale else error


def snapshot(module: nn.Module) -> tuple[dict[str, Tensor], list[bool]]:
    """Return what fusing must leave alone: every tensor, and the mode of every part."""
    tensors = {key: value.clone() for key, value in module.state_dict().items()}
    return tensors, [part.training for part in module.modules()]


def is_unchanged(module: nn.Module, before: tuple[dict[str, Tensor], list[bool]]) -> bool:
    tensors, modes = snapshot(module)
    return (
        modes == before[1]
        and tensors.keys() == before[0].keys()
        and all(torch.equal(tensors[key], value) for key, value in before[0].items())
    )
