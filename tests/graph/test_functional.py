"""Writes in place: left out by renaming where that is all there is to them, else by torch's own functionalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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


ACTIVATIONS = [
    functional.relu, functional.relu6, functional.hardtanh, functional.leaky_relu, functional.silu,
    functional.hardswish,
]  # fmt: skip


def operators_run(module: nn.Module, x: Tensor) -> set[str]:
    """Return the names of the operators that a call of ``module`` runs."""

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Log() as log, torch.no_grad():
        module(x)
    return log.names


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("is_sum", [False, True])
def test_an_activation_runs_over_what_nobody_else_reads(activation: Callable[..., Tensor], is_sum: bool) -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        y = part.conv(x)
        return activation(y + x if is_sum else y) * 2

    module = randomised(Formula(forward, conv=conv(4, 4))).double()
    model = ProgramModule(trace(module, (noise(SHAPE)[0].double(),), may_vary=STATIC))
    values, gradients = [], []
    for one in (module, model):
        x = noise(SHAPE, seed=1)[0].double().requires_grad_()
        before = x.detach().clone()
        one.zero_grad()
        found = one(x)
        found.square().sum().backward()
        assert torch.equal(x, before)
        values.append(found)
        gradients.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    assert torch.equal(*values)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert any(name.endswith("_") for name in operators_run(model, x.detach()))


SHARED: list[Callable[[Any, Tensor], Any]] = [
    lambda p, x: functional.relu(x) + p.conv(x),  # the caller's
    lambda p, x: (lambda y: functional.relu(y) - y)(p.conv(x)),  # read once more
    lambda p, x: (lambda y: (functional.relu(y), y))(p.conv(x)),  # given out
    lambda p, x: functional.relu(p.conv.weight) + p.conv(x).mean(),  # a parameter
    lambda p, x: functional.relu(p.conv(x)[:, :2]),  # a view
    lambda p, x: functional.relu(torch.sigmoid(p.conv(x))),  # whose gradient needs it
]


@pytest.mark.parametrize("forward", SHARED)
def test_what_someone_else_may_read_is_not_written_over(forward: Callable[[Any, Tensor], Any]) -> None:
    module = randomised(Formula(forward, conv=conv(4, 4)))
    model = ProgramModule(trace(module, noise(SHAPE), may_vary=STATIC))
    x = noise(SHAPE, seed=1)[0]
    assert not any(name.endswith("_") for name in operators_run(model, x))
    for one, other in zip(pytree.tree_leaves(model(x)), pytree.tree_leaves(module(x)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_stays_functional(strict: bool) -> None:
    module = randomised(Formula(lambda p, x: functional.relu(p.conv(x)), conv=conv(4, 4)))
    model = ProgramModule(trace(module, noise(SHAPE), may_vary=STATIC))
    graph = torch.export.export(model, noise(SHAPE), strict=strict).graph
    assert torch.ops.aten.relu.default in {node.target for node in graph.nodes}


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
