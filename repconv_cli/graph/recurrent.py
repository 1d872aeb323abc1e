"""An LSTM that looks at its weights before it runs.

torch hands them to oneDNN unseen, whose kernel takes weights of any shape for those that it needs and reads past their
end. A graph from a file may name any tensors of the file, so there the shapes are looked at, at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_LIBRARY = torch.library.Library("repconv", "DEF")  # type: ignore[no-untyped-call]
_SCHEMA = str(_aten.lstm.input._schema).replace("aten::lstm.input(", "lstm(")
_LIBRARY.define(_SCHEMA, tags=tuple(_aten.lstm.input.tags))  # type: ignore[no-untyped-call]


def lstm(
    x: Tensor,
    state: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``aten.lstm.input`` gives: (outputs, last hidden state, last cell state).

    Each layer and direction has the weights (4 hidden, features), (4 hidden, outputs), with biases twice (4 hidden),
    and with a projection (outputs, hidden); ``state`` are two tensors (layers * directions, samples, outputs or
    hidden). Without a projection there are as many outputs as are hidden.

    Raises:
        ValueError: something has another shape or dtype.
    """
    directions = 2 if bidirectional else 1
    steps = layers * directions
    given = len(weights) // max(steps, 1)
    is_projected = given % 2 == 1
    if x.ndim != 3 or len(state) != 2 or steps < 1 or len(weights) != steps * given:
        raise ValueError("an LSTM reads a sequence of three axes, two states and as many weights for each layer")
    if given != 2 + 2 * has_biases + is_projected or any(weight.ndim == 0 for weight in weights):
        raise ValueError("an LSTM has two weights for each layer, two biases and at most one projection")
    hidden = weights[0].shape[0] // 4
    outputs = weights[given - 1].shape[0] if is_projected else hidden
    samples = x.shape[0 if batch_first else 1]
    expected: list[tuple[int, ...]] = []
    for layer in range(layers):
        features = x.shape[2] if layer == 0 else outputs * directions
        one: list[tuple[int, ...]] = [(4 * hidden, features), (4 * hidden, outputs)]
        one += [(4 * hidden,)] * (2 if has_biases else 0) + [(outputs, hidden)] * is_projected
        expected += one * directions
    expected += [(steps, samples, outputs), (steps, samples, hidden)]
    for tensor, shape in zip((*weights, *state), expected, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"an LSTM is given {tuple(tensor.shape)} of {tensor.dtype} where it needs {shape} of {x.dtype}"
            )
    found: tuple[Tensor, Tensor, Tensor] = _aten.lstm.input(
        x, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first
    )
    return found


_LIBRARY.impl("lstm", lstm, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
CHECKED = {_aten.lstm.input: torch.ops.repconv.lstm.default}
"""The operators that run only after a look at what they are given, instead of those that look at nothing."""
AS_FUNCTIONS = {torch.ops.repconv.lstm.default: lstm}
"""The same as functions, in which what traces a module finds torch's own operators."""
