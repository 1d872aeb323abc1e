"""Writes in place: left out by renaming where that is all there is to them, else by torch's own functionalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from repconv_cli.errors import TraceError
from repconv_cli.graph.functional import is_renamable
from repconv_cli.graph.program import ProgramModule
from repconv_cli.graph.trace import trace
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 9, 9)
STATIC = ((True, False, False, False),)


@dataclass(frozen=True)
class Written:
    """A forward with writes in place, and whether renaming is enough."""

    name: str
    function: Callable[[Any, Tensor], Any]
    is_renamed: bool


def two_names(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    z = y.relu_()
    z.add_(x)
    return y * 2 + z  # type: ignore[no-any-return]


def read_before_it_is_written(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    before = y * 3
    y.mul_(2)
    return before + y  # type: ignore[no-any-return]


def a_view_is_read_after(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    half = y[:, :2]
    y.relu_()
    return half.sum((1, 2, 3)) + y.sum((1, 2, 3))  # type: ignore[no-any-return]


def a_view_is_written(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    y[:, :, 0] = 0.0
    return y * 2  # type: ignore[no-any-return]


def a_part_is_written(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    first, second = y.chunk(2, 1)
    first.relu_()
    return torch.cat([y, second], 1)


def a_view_is_made_after(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x).relu_()
    half = y[:, :2]
    return half + y[:, 2:]  # type: ignore[no-any-return]


def dropout_is_no_copy(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    z = functional.dropout(y, 0.5, training=False)
    z.add_(1.0)
    return y + z  # type: ignore[no-any-return]


def a_reshape_may_be_a_view(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x)
    flat = y.reshape(x.shape[0], 4, 81)
    flat.mul_(2)
    return y.sum((2, 3)) + flat.sum(2)  # type: ignore[no-any-return]


def another_dtype_is_added(part: Any, x: Tensor) -> Tensor:
    y = part.conv(x).half()
    y.add_(x)
    return y  # type: ignore[no-any-return]


def a_constant_is_counted_up(part: Any, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for _ in range(3):
        total += 1.0
    return part.conv(x) * total  # type: ignore[no-any-return]


WRITTEN = [
    Written("activation", lambda p, x: functional.relu(p.conv(x), inplace=True), True),
    Written("residual", lambda p, x: functional.silu(p.conv(x).add_(x), inplace=True), True),
    Written("two_names", two_names, True),
    Written("read_before_it_is_written", read_before_it_is_written, True),
    Written("a_view_is_made_after", a_view_is_made_after, True),
    Written("a_view_is_read_after", a_view_is_read_after, False),
    Written("a_view_is_written", a_view_is_written, False),
    Written("a_part_is_written", a_part_is_written, False),
    Written("dropout_is_no_copy", dropout_is_no_copy, True),
    Written("a_reshape_may_be_a_view", a_reshape_may_be_a_view, False),
    Written("another_dtype_is_added", another_dtype_is_added, False),
    Written("a_constant_is_counted_up", a_constant_is_counted_up, True),
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_what_is_written_in_place_is_what_is_read_later(case: Written) -> None:
    module = randomised(Formula(case.function, conv=conv(4, 4)))
    program = trace(module, noise(SHAPE), may_vary=STATIC)
    assert not any(node.target._schema.is_mutable for node in program.graph.nodes if hasattr(node.target, "_schema"))
    x = noise((3, *SHAPE[1:]), seed=1)[0]
    with torch.no_grad():
        assert torch.equal(ProgramModule(program)(x), module(x.clone()))


def exported(module: nn.Module) -> fx.Graph:
    with torch.no_grad():
        return torch.export.export(module, noise(SHAPE), strict=False).graph


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case.name)
def test_only_plain_writes_are_renamed(case: Written) -> None:
    module = randomised(Formula(case.function, conv=conv(4, 4)))
    assert is_renamable(exported(module)) is case.is_renamed


def test_a_norm_that_updates_its_statistics_is_refused() -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        norm = part.block[1]
        return functional.batch_norm(part.block[0](x), norm.running_mean, norm.running_var, training=True)

    module = randomised(Formula(forward, block=conv_bn(4, 4)))
    with pytest.raises(TraceError, match=r"writes to block\.1\.running_mean while it runs"):
        trace(module, noise(SHAPE))


def test_an_input_that_is_written_to_is_refused() -> None:
    module = randomised(Formula(lambda p, x: p.conv(x.relu_()), conv=conv(4, 4)))
    with pytest.raises(TraceError, match="writes to x while it runs"):
        trace(module, noise(SHAPE))


def test_inplace_layers_of_the_zoo_need_no_functionalization() -> None:
    module = randomised(
        nn.Sequential(conv_bn(4, 4), nn.ReLU6(inplace=True), nn.Dropout(), conv(4, 4), nn.Hardswish(True))
    )
    assert is_renamable(torch.export.export(module, noise(SHAPE), strict=False).graph)
    program = trace(module, noise(SHAPE), may_vary=STATIC)
    assert not any("dropout" in str(node.target) for node in program.graph.nodes)
