"""The graph that is written for a module of torch's layers is the one that torch's exporter gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from repconv_cli.by_family import recognise
from repconv_cli.checkpoint.families.modules import Branches, PaddedFirst, PerChannel, rebuild_block
from repconv_cli.folding import WRITERS
from repconv_cli.graph.layers import program_of
from repconv_cli.graph.program import Program
from repconv_cli.graph.trace import trace
from tests.families.reference import CASES, Case, drawn


def described(program: Program) -> list[Any]:
    """Return what every call is, reads and gives, with the operator's own defaults where an argument is not said."""
    names: dict[fx.Node, str] = {}
    found: list[Any] = []
    for node in program.graph.nodes:
        names[node] = str(node.target) if node.op == "get_attr" else f"{node.op} {len(found)}"
        if node.op == "call_function":
            given = [names[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
            defaults = [argument.default_value for argument in node.target._schema.arguments[len(given) :]]
            found.append((node.target, [_shortest(value) for value in (*given, *defaults)], node.meta))
    return found


def _shortest(value: Any) -> Any:
    """Return one number where it stands for the same along each axis."""
    return value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value


def assert_same_graph(module: nn.Module, example: tuple[int, ...]) -> None:
    written = program_of(module, example, WRITERS)
    all_but_channels = tuple(axis != 1 for axis in range(len(example)))
    traced = trace(module, (torch.randn(example, dtype=torch.float64),), may_vary=(all_but_channels,))
    assert described(written) == described(traced)
    assert (written.inputs[0].shape, written.parameters) == (traced.inputs[0].shape, traced.parameters)
    assert written.tensors.keys() == traced.tensors.keys()
    assert (written.arguments, written.keywords, written.outputs) == (traced.arguments, traced.keywords, traced.outputs)


@pytest.mark.parametrize("case", CASES, ids=[case.family for case in CASES])
def test_every_block_of_every_family_has_the_exporters_graph(case: Case) -> None:
    state = drawn(case.training(), case.eps).state_dict()
    tensors: dict[str, Tensor] = {key: value.double() for key, value in state.items()}
    graphs = set()
    for block in recognise(tensors).blocks:
        rebuilt = rebuild_block(block, tensors, lambda path: case.eps)
        if str(rebuilt) not in graphs:
            assert_same_graph(rebuilt.module, rebuilt.example)
        graphs.add(str(rebuilt))
    assert graphs


LAYERS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    (nn.Conv3d(4, 6, (3, 1, 3), padding=(2, 0, 1), dilation=(2, 1, 1)), (2, 4, 7, 9, 11)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), groups=2, dilation=(1, 2), bias=False), (2, 4, 7, 9)),
    (nn.ConvTranspose3d(2, 3, 2), (2, 2, 5, 6, 7)),
    (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4)),
    (nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d((3, 2), stride=2, padding=(1, 0))), (2, 4, 9, 11)),
    (nn.Sequential(nn.Conv1d(4, 4, 1), nn.AvgPool1d(3)), (2, 4, 11)),
    (PaddedFirst(nn.Conv2d(4, 4, 3), (1, 2, 3, 0)), (2, 4, 7, 9)),
    (nn.Sequential(PerChannel(torch.randn(4), 2, is_shift=True), nn.Conv2d(4, 4, 1)), (2, 4, 7, 9)),
    (Branches([nn.Conv2d(4, 4, 1), nn.Identity(), nn.Conv2d(4, 4, 1)], (1, -1, 1), 3), (2, 4, 7, 9)),
]


@pytest.mark.parametrize(("module", "example"), LAYERS, ids=[str(i) for i in range(len(LAYERS))])
def test_layers_of_every_kind_have_the_exporters_graph(module: nn.Module, example: tuple[int, ...]) -> None:
    module.double().eval()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part._buffers["num_batches_tracked"] = None
    assert_same_graph(module, example)


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.AvgPool2d(3, ceil_mode=True), nn.AvgPool2d(3, padding=1, count_include_pad=False)]
)
def test_what_is_no_layer_of_a_block_has_no_written_graph(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="no graph is written for a"):
        program_of(module, (2, 4, 7, 9))
