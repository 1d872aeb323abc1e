"""Equal structures are those of which a probe of one tells about the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.errors import InexactError
from repconv_cli.graph import probe as probing
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.plan import make_plan
from repconv_cli.graph.structure import structure_of
from repconv_cli.graph.trace import trace

SHAPE = (2, 4, 6)


class Mixed(nn.Module):
    """A linear layer over the positions, then one over the channels: no convolution."""

    def __init__(self, seed: int, shift: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.positions, self.channels, self.shift = nn.Linear(6, 6), nn.Linear(4, 4), shift

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.positions(x.roll(self.shift, 2)).transpose(1, 2)
        return self.channels(mixed).transpose(1, 2)


def structure(module: nn.Module) -> str | None:
    program = trace(module.eval(), (torch.zeros(SHAPE),))
    (last,) = program.output_nodes()
    constants = Constants(program)
    anchor = next(node for node in program.graph.nodes if node.op == "placeholder")
    return structure_of(anchor, region_between(anchor, last, constants), constants)


def changed(change: Callable[[Tensor], None]) -> nn.Module:
    module = Mixed(0)
    with torch.no_grad():
        change(module.positions.weight)
    return module


def test_other_weights_are_the_same_structure_and_other_operands_are_not() -> None:
    assert structure(Mixed(0)) is not None
    assert structure(Mixed(0)) == structure(Mixed(1))
    assert structure(Mixed(0)) != structure(Mixed(0, shift=2))


def test_a_bias_of_zeros_is_in_general_position() -> None:
    module = Mixed(0)
    nn.init.zeros_(module.positions.bias)
    assert structure(module) == structure(Mixed(0))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[2, 3].zero_(),
        lambda weight: weight.copy_(torch.eye(6)),
        lambda weight: weight[1, 1].copy_(weight[0, 0]),
    ],
    ids=["a zero", "the identity", "a diagonal of equal entries"],
)
def test_weights_that_are_not_in_general_position_have_none(change: Callable[[Tensor], None]) -> None:
    assert structure(changed(change)) is None


def test_what_failed_in_one_block_is_not_tried_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[int] = []
    probe = probing.probe

    def counted(*args: object) -> object:
        try:
            return probe(*args)  # type: ignore[arg-type]
        except InexactError:
            failed.append(1)
            raise

    monkeypatch.setattr(probing, "probe", counted)

    def failures(blocks: int) -> int:
        failed.clear()
        parts = [part for seed in range(blocks) for part in (Mixed(seed), nn.ReLU())]
        make_plan(trace(nn.Sequential(*parts).eval(), (torch.zeros(SHAPE),)))
        return len(failed)

    assert failures(8) == failures(4) > 0
