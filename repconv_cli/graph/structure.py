"""What a region of a graph is made of, whatever its weights: equal for the blocks that a model repeats.

Whether a region is a convolution is a question of zeros and of equal entries in its matrix. For weights in general
position (no zeros, no diagonal of equal entries) these follow from the operators, their sizes and how they are joined:
what is no convolution for one such set of weights is none for another, but for sets of measure zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.graph.constants import Constants

# Added, so that only the constant of the map depends on them.
_BIASES = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2}
_MOST_INTEGERS = 1 << 16


def structure_of(anchor: fx.Node, region: list[fx.Node], constants: Constants) -> str | None:
    """Return the structure of ``region`` on ``anchor``, None where a weight is not known to be in general position."""
    places = {anchor: "x", **{node: f"%{index}" for index, node in enumerate(region)}}
    told: list[Any] = [anchor.meta["shape"], anchor.meta["free"]]
    for node in region:
        bias = _bias_of(node)
        names = {}
        for source in node.all_input_nodes:
            name = places.get(source) or _told(source, constants, is_bias=source is bias)
            if name is None:
                return None
            names[source] = name
        told.append((str(node.target), map_arg((node.args, node.kwargs), names.__getitem__)))
    return repr(told)


def _bias_of(node: fx.Node) -> Any:
    place = _BIASES.get(str(node.target).split(".")[1]) if str(node.target).startswith("aten.") else None
    return node.args[place] if place is not None and len(node.args) > place else None


def _told(source: fx.Node, constants: Constants, *, is_bias: bool) -> str | None:
    if source.op != "get_attr":
        value = constants.value(source) if source.meta.get("is_size") else None
        return None if value is None else f"size {value}"
    stored = constants.stored(source)
    kind = f"{tuple(stored.shape)} {stored.dtype}"
    if is_bias:
        return f"bias {kind}"
    if not stored.is_floating_point():
        return f"{kind} {stored.tolist()}" if stored.numel() <= _MOST_INTEGERS else None
    return f"weight {kind}" if _is_general(stored) else None


def _is_general(weight: Tensor) -> bool:
    """Whether no entry is zero, and none is equal to the next one on its diagonal."""
    if weight.ndim < 2 or bool((weight == 0).any()):
        return False
    matrix = weight.flatten(1)
    return not bool(torch.eq(matrix[1:, 1:], matrix[:-1, :-1]).any())
