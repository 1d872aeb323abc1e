"""Operators that are run for the float64 yardstick: each as its own version of ONNX has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from repconv_cli.errors import NotRunnableError
from repconv_cli.onnx.operator import OnnxOperator

DATA = np.arange(6.0).reshape(1, 2, 3)
# Attributes that became inputs at opset 13.
OLD: list[tuple[str, dict[str, Any], list[np.ndarray[Any, Any]]]] = [
    ("Unsqueeze", {"axes": [0, 2]}, [DATA.reshape(1, 1, 1, 2, 3)]),
    ("Squeeze", {"axes": [0]}, [DATA[0]]),
    ("ReduceSum", {"axes": [2], "keepdims": 0}, [DATA.sum(2)]),
    ("Split", {"axis": 2, "split": [1, 2]}, [DATA[..., :1], DATA[..., 1:]]),
    ("Softmax", {"axis": 2}, [np.exp(DATA) / np.exp(DATA).sum(2, keepdims=True)]),
]


@pytest.mark.parametrize(("name", "attributes", "expected"), OLD, ids=[case[0] for case in OLD])
@pytest.mark.parametrize("opset", [11, 12])
def test_an_old_operator_is_run_as_it_was(
    name: str, attributes: dict[str, Any], expected: list[np.ndarray[Any, Any]], opset: int
) -> None:
    node = helper.make_node(name, ["x"], [f"y{index}" for index in range(len(expected))], **attributes)
    found = OnnxOperator(node, opset)(torch.from_numpy(DATA))
    outputs = found if isinstance(found, tuple) else (found,)
    for value, other in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(value.numpy(), other, rtol=1e-12)


@pytest.mark.parametrize("attributes", [{}, {"axis": 1}, {"axis": -2}])
def test_a_softmax_that_joins_axes_is_not_run_by_a_reference_that_does_not(attributes: dict[str, Any]) -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], **attributes)
    with pytest.raises(NotRunnableError, match="Softmax"):
        OnnxOperator(node, 12)(torch.from_numpy(DATA))
    if attributes:
        found = OnnxOperator(node, 13)(torch.from_numpy(DATA))
        np.testing.assert_allclose(found.numpy().sum(1), 1.0)


def test_a_new_operator_reads_its_axes_from_an_input() -> None:
    node = helper.make_node("Unsqueeze", ["x", "axes"], ["y"])
    found = OnnxOperator(node, 13)(torch.tensor(3.0), torch.tensor([0]))
    assert found.shape == (1,)


def test_outputs_without_a_name_are_none() -> None:
    node = helper.make_node("TopK", ["x", "k"], ["", "places"], axis=2)
    first, places = OnnxOperator(node, 13)(torch.from_numpy(DATA), torch.tensor([2]))
    assert first is None
    assert places.tolist() == [[[2, 1], [2, 1]]]
