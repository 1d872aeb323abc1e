"""Each model of the catalogue is built, traced and fused once, and tested on what came of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import CATALOGUE, ZooModel
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.program import Program
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs


@dataclass(frozen=True)
class FusedModel:
    """A model of the catalogue, what it was before fusing, and what came of it."""

    model: ZooModel
    module: nn.Module
    state_before: dict[str, Tensor]
    code_before: str
    program: Program
    fused: Fused

    def own_counts(self) -> dict[str, int] | None:
        """Return what the library's own converter leaves, or None where there is none."""
        own = self.model.build_own(self.module)
        return None if own is None else count_ops(trace_at_fixed_sizes(self.model, own))


def trace_at_fixed_sizes(model: ZooModel, module: nn.Module) -> Program:
    """Trace ``module``; free sizes are tested elsewhere, and take most of the time."""
    args, kwargs = model.example()
    leaves = [*args, *kwargs.values()]
    return trace(module, args, kwargs, may_vary=tuple((False,) * leaf.ndim for leaf in leaves))


@pytest.fixture(scope="module", params=[model for model in CATALOGUE if model.in_tests], ids=lambda model: model.name)
def fused_model(request: pytest.FixtureRequest) -> FusedModel:
    """Give each tested model in turn, fused and proven."""
    model: ZooModel = request.param
    module = model.build()
    state = copy.deepcopy(module.state_dict())
    program = trace_at_fixed_sizes(model, module)
    code = str(program.graph)
    fused = fuse_program(program, random_inputs(program, 1, 0), dtype=torch.float32)
    return FusedModel(model, module, state, code, program, fused)
