"""An LSTM from a file: torch's own where its weights fit, refused before its kernel runs where they do not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.errors import InputError
from repconv_cli.graph.calls import checked_call
from repconv_cli.graph.operators import find_operator, operator_name

KINDS = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"proj_size": 2, "num_layers": 2},
    {"proj_size": 2, "bias": False, "bidirectional": True},
]


def call_of(kind: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[nn.LSTM, list[Any]]:
    """Return a layer of 5 features and 4 hidden ones, and the operator's arguments for 3 samples of 6 steps."""
    layer = nn.LSTM(5, 4, **kind).to(dtype)
    shape = (3, 6, 5) if layer.batch_first else (6, 3, 5)
    directions = layer.num_layers * (1 + layer.bidirectional)
    state = [torch.randn(directions, 3, size, dtype=dtype) for size in (layer.proj_size or 4, 4)]
    options = (layer.bias, layer.num_layers, 0.0, False, layer.bidirectional, layer.batch_first)
    return layer, [torch.randn(shape, dtype=dtype), state, list(layer._flat_weights), *options]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_it_is_torchs(kind: dict[str, Any], dtype: torch.dtype) -> None:
    layer, args = call_of(kind, dtype)
    outputs, (hidden, cell) = layer(args[0], tuple(args[1]))
    found = find_operator("aten.lstm.input")(*args)
    for one, other in zip(found, (outputs, hidden, cell), strict=True):
        assert torch.equal(one, other)


def smaller(tensor: Tensor, axis: int) -> Tensor:
    return tensor.detach().narrow(axis, 0, tensor.shape[axis] - 1).contiguous()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_whatever_does_not_fit_is_refused(kind: dict[str, Any]) -> None:
    run = find_operator("aten.lstm.input")
    _, (x, state, weights, *options) = call_of(kind)
    for place, weight in enumerate(weights):
        for axis in range(weight.ndim):
            with pytest.raises(ValueError, match="an LSTM"):
                run(x, state, [*weights[:place], smaller(weight, axis), *weights[place + 1 :]], *options)
        for other in (weight.double(), weight.detach().sum(), weight[None]):
            with pytest.raises(ValueError, match="an LSTM"):
                run(x, state, [*weights[:place], other, *weights[place + 1 :]], *options)
    for place, axis in itertools.product(range(2), range(3)):
        states = [smaller(part, axis) if index == place else part for index, part in enumerate(state)]
        with pytest.raises(ValueError, match="an LSTM"):
            run(x, states, weights, *options)
    steps = 1 if options[-1] else 0
    run(smaller(x, steps), state, weights, *options)
    for axis in {0, 1, 2} - {steps}:
        with pytest.raises(ValueError, match="an LSTM"):
            run(smaller(x, axis), state, weights, *options)
    for wrong in ((x[0], state, weights), (x, state[:1], weights), (x, state, weights[:-1]), (x, state, [])):
        with pytest.raises(ValueError, match="an LSTM"):
            run(*wrong, *options)
    has_biases, layers, *rest = options
    for changed in ((not has_biases, layers), (has_biases, layers + 1), (has_biases, 0), (has_biases, -1)):
        with pytest.raises(ValueError, match="an LSTM"):
            run(x, state, weights, *changed, *rest)


def test_values_that_do_not_lie_in_order_are_read_where_they_lie() -> None:
    run = find_operator("aten.lstm.input")
    _, (x, state, weights, *options) = call_of({})
    for spread in (lambda t: t.detach().mean().expand(t.shape), lambda t: t.detach().mT.contiguous().mT):
        laid_out = [spread(weight) if weight.ndim == 2 else weight for weight in weights]
        states = [spread(part) for part in state]
        found = run(spread(x), states, laid_out, *options)
        copies = [[tensor.contiguous() for tensor in tensors] for tensors in (states, laid_out)]
        for one, other in zip(found, torch.ops.aten.lstm.input(spread(x).contiguous(), *copies, *options), strict=True):
            assert torch.equal(one, other)


def test_its_name_is_torchs_and_it_draws_no_random_numbers() -> None:
    target = find_operator("aten.lstm.input")
    assert target is not torch.ops.aten.lstm.input
    assert operator_name(target) == "aten.lstm.input"
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(InputError, match="draws random numbers"):
        checked_call(graph, target, (x, [x, x], [x] * 8, True, 2, 0.5, True, False, False), {})
