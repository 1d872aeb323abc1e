"""What no input reaches is stored once, where that takes an operation away and not much room."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.facts import totals
from repconv_cli.graph.batches import _Known
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.plan import count_ops, make_plan
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.trace import trace
from tests.graph.proof import noise

SHAPE = (2, 4, 6, 6)


class Attention(nn.Module):
    """A position bias gathered from a table, as Swin, LeViT and TinyViT do at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(4, 11))
        self.register_buffer("places", torch.arange(6)[:, None] - torch.arange(6)[None] + 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) + self.table[:, self.places]).softmax(-1)


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.head = nn.Conv2d(4, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.part(x))
        return y


class Made(nn.Module):
    """``max(x, value)``, the value made by ``make`` from a parameter and the input."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6) + 0.5)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.make(self.weight, x))


def fused_of(part: nn.Module) -> tuple[Program, Fused]:
    program = trace(Model(part), noise(SHAPE))
    return program, fuse_program(program, [noise(SHAPE)], dtype=torch.float32)


def test_a_gathered_bias_is_stored_under_its_modules_path():
    module = Model(Attention())
    program = trace(module, noise(SHAPE))
    fused = fuse_program(program, [noise(SHAPE)], dtype=torch.float32)
    assert [(item.key, sorted(item.sources)) for item in fused.plan.lifted] == [
        ("part.constant", ["part.places", "part.table"])
    ]
    stored = fused.program.tensors
    assert torch.equal(stored["part.constant"], module.part.table[:, module.part.places])
    assert stored["part.constant"].is_contiguous()
    assert not {"part.table", "part.places"} & set(stored)
    (x,) = noise((3, 4, 6, 6))
    assert torch.allclose(ProgramModule(fused.program)(x), module(x), atol=1e-6)
    assert "part.constant" in dict(ProgramModule(fused.program).named_parameters())


def test_counts_are_those_of_the_graph_that_is_written():
    program, fused = fused_of(Attention())
    counted, planned = count_ops(fused.program), totals(make_plan(program))
    assert (planned.ops.before, planned.ops.after) == (count_ops(program)["ops"], counted["ops"])
    assert planned.ops.after == planned.ops.before - 1
    parameters = sum(fused.program.tensors[key].numel() for key in fused.program.parameters)
    assert planned.params.after == parameters


@pytest.mark.parametrize(
    "make",
    [
        lambda w, x: w.reshape(6, 1),
        lambda w, x: w.expand(6, 6),
        lambda w, x: (x.reshape(-1, 1) * torch.linspace(0, 1, 2**15).exp()).sum(1).reshape(x.shape),
        lambda w, x: (w[0] * x.shape[2]).exp(),
        lambda w, x: (torch.view_as_complex(x.reshape(*x.shape[:3], 3, 2)) * torch.polar(w, w)[:3]).real.repeat(
            1, 1, 1, 2
        ),
    ],
    ids=["only moved", "only repeated", "takes more room than it is worth", "made for a size", "complex"],
)
def test_what_stays(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert not make_plan(trace(Model(Made(make)), noise(SHAPE))).lifted


def test_of_a_repeated_value_the_value_is_stored():
    _, fused = fused_of(Made(lambda w, x: (w * w).expand(6, 6)))
    (item,) = fused.plan.lifted
    assert item.node.meta["shape"] == (6,)
    assert fused.float64_error == 0.0


def test_nothing_is_stored_when_only_some_blocks_are_asked_for():
    program = trace(Model(nn.Sequential(Attention(), nn.BatchNorm2d(4))), noise(SHAPE))
    assert make_plan(program).lifted
    names = [block.name for block in make_plan(program).blocks]
    assert not make_plan(program, only=names[0]).lifted


@pytest.mark.parametrize(
    "make",
    [
        lambda weight, x: torch.arange(6).type_as(x) + 0.5,
        lambda weight, x: (torch.arange(6) + 2).type_as(x) * weight,
        lambda weight, x: x.new_full((6,), 3.0) / weight.sqrt(),
        lambda weight, x: x.new_zeros((6,)) + x.new_ones(6).exp() * weight,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_of_an_input_that_is_read_for_its_type_nothing_is_read(
    make: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    module = Model(Made(make)).to(dtype)
    inputs = tuple(x.to(dtype) for x in noise(SHAPE))
    fused = fuse_program(trace(module, inputs), [inputs], dtype=dtype)
    assert count_ops(fused.program)["ops"] == 2
    (lifted,) = fused.plan.lifted
    assert fused.program.tensors[lifted.key].dtype == lifted.node.meta["dtype"]
    with torch.no_grad():
        torch.testing.assert_close(ProgramModule(fused.program)(*inputs), module(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, "mul"), (torch.float16, "type_as")])
def test_a_constant_is_stored_up_to_the_cast_that_rounds_it(dtype: torch.dtype, last: str) -> None:
    module = Model(Made(lambda weight, x: (torch.arange(6) / 3).type_as(x) * weight)).to(dtype)
    inputs = tuple(x.to(dtype) for x in noise(SHAPE))
    fused = fuse_program(trace(module, inputs), [inputs], dtype=dtype)
    (lifted,) = fused.plan.lifted
    assert lifted.node.name.startswith(last)
    assert fused.program.tensors[lifted.key].dtype == dtype
    with torch.no_grad():
        assert torch.equal(ProgramModule(fused.program)(*inputs), module(*inputs))


def test_a_table_made_in_float64_is_stored_as_it_is_read() -> None:
    module = Model(Made(lambda weight, x: (weight.double() / 3).exp().float()[:, None]))
    program = trace(module, noise(SHAPE))
    fused = fuse_program(program, [noise(SHAPE)], dtype=torch.float32)
    (lifted,) = fused.plan.lifted
    assert fused.program.tensors[lifted.key].dtype == torch.float32
    assert count_ops(fused.program)["ops"] == totals(fused.plan).ops.after == count_ops(program)["ops"] - 5
    with torch.no_grad():
        assert torch.equal(ProgramModule(fused.program)(*noise(SHAPE)), module(*noise(SHAPE)))


def test_a_weight_that_is_rounded_at_each_call_is_stored_rounded() -> None:
    module = Model(Made(lambda weight, x: weight.half().float() * 3))
    fused = fuse_program(trace(module, noise(SHAPE)), [noise(SHAPE)], dtype=torch.float32)
    (lifted,) = fused.plan.lifted
    assert fused.program.tensors[lifted.key].dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(ProgramModule(fused.program)(*noise(SHAPE)), module(*noise(SHAPE)))


def test_a_value_of_the_type_of_itself_is_read() -> None:
    program = trace(Model(Made(lambda _, x: x[0, 0, 0].exp())), noise(SHAPE))
    # A trace leaves such a cast out; the graph of a file may have one.
    (read,) = (node for node in program.graph.nodes if node.target is torch.ops.aten.exp.default)
    (row,) = read.args
    with program.graph.inserting_before(read):
        node = program.graph.call_function(torch.ops.aten.type_as.default, (row, row))
    node.meta = dict(row.meta)
    read.args = (node,)
    assert node.args[0] is node.args[1]
    assert node not in Constants(program)
    assert node not in _Known(program)
    fused = fuse_program(program, [noise(SHAPE)], dtype=torch.float32)
    assert not fused.plan.lifted
    x = noise(SHAPE)[0]
    torch.testing.assert_close(ProgramModule(fused.program)(x), ProgramModule(program)(x))


def test_work_is_told_of_what_is_left_alone_too() -> None:
    # The second convolution is a block's input: every reader of its value goes, it does not.
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    module.append(nn.BatchNorm2d(2))
    found = totals(make_plan(trace(module.eval(), noise(SHAPE)))).macs
    work = 4 * 4 * 9 * 4 * 4 + 2 * 2 * 4 * 8 * 9 + 2 * 2 * 8 * 2
    assert (found.before, found.after) == (work, work)
