"""A graph run in float64: large layers some output channels at a time, as if they were run whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.algebra.slabs import is_large
from repconv_cli.graph.interpret import run_program, run_side_by_side
from repconv_cli.graph.program import Program
from repconv_cli.graph.trace import trace
from tests.graph.proof import noise

LAYERS = {
    "conv1d": (nn.Conv1d(6, 10, 3, padding=1), (2, 6, 9)),
    "conv2d_strided_without_bias": (nn.Conv2d(6, 11, 3, stride=2, padding=1, dilation=2, bias=False), (2, 6, 9, 8)),
    "conv3d": (nn.Conv3d(4, 7, 2), (2, 4, 5, 4, 3)),
    "linear": (nn.Linear(12, 9), (2, 12)),
    "linear_on_tokens_without_bias": (nn.Linear(12, 9, bias=False), (2, 5, 12)),
    "grouped": (nn.Conv2d(6, 12, 3, groups=3), (2, 6, 9, 8)),
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=LAYERS)
def program(request: pytest.FixtureRequest, dtype: torch.dtype) -> Program:
    module, shape = LAYERS[request.param]
    inputs = tuple(x.to(dtype) for x in noise(shape))
    return trace(nn.Sequential(module, nn.ReLU()).to(dtype).eval(), inputs)


def outputs(program: Program) -> Tensor:
    inputs = [torch.randn(info.example, generator=torch.Generator().manual_seed(1)) for info in program.inputs]
    with torch.no_grad():
        (found,), _ = run_program(program, inputs)
    return found


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_a_layer_run_in_pieces_is_the_layer(program: Program, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outputs(program)
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 5)
    monkeypatch.setattr("repconv_cli.graph.interpret._FEWEST_ROWS", rows)
    pieces = outputs(program)
    assert pieces.dtype == torch.float64
    torch.testing.assert_close(pieces, whole, rtol=1e-14, atol=1e-14)


def test_a_large_weight_is_never_there_in_float64() -> None:
    program = trace(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()).eval(), noise((2, 1024)))
    assert is_large(next(tensor for tensor in program.tensors.values() if tensor.ndim == 2))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.dtype == torch.float64:
                largest = max(largest, found.numel())
            return found

    with torch.no_grad(), Watch():
        run_side_by_side(program, [noise((1, 1024))], lambda key: program.tensors[key])
    assert 0 < largest < 1024 * 1024 / 4


@pytest.mark.parametrize("unfolded", [1, 8 * 9 * 72 * 2, 8 * 9 * 72 * 4])
@pytest.mark.parametrize("values", [5, 1 << 17])
def test_a_convolution_is_a_sum_over_some_channels_at_a_time(
    program: Program, unfolded: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outputs(program)
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", values)
    monkeypatch.setattr("repconv_cli.graph.interpret._UNFOLDED_BYTES", unfolded)
    torch.testing.assert_close(outputs(program), whole, rtol=1e-14, atol=1e-14)


def test_an_image_is_never_unfolded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(nn.Sequential(nn.Conv2d(16, 8, 5), nn.ReLU()).eval(), noise((1, 16, 32, 32)))
    monkeypatch.setattr("repconv_cli.graph.interpret._UNFOLDED_BYTES", 8 * 4 * 25 * 32 * 32)
    read: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                read.append(args[1].shape[1])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        outputs(program)
    assert read == [4, 4, 4, 4]
