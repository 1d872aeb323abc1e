"""The matrix of a node on one row of its anchor: the Jacobian of what is between them, made only for what is taken.

A row is a run of consecutive values: those of a sample, or of a partition of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.algebra import ConvMap, Geometry, Kernel
from repconv_cli.algebra.operations import regroup
from repconv_cli.algebra.unrolled import add_unrolled
from repconv_cli.errors import UnprovenError
from repconv_cli.graph.arrange import PERMUTES, order_of
from repconv_cli.graph.constants import Constants, region_between
from repconv_cli.graph.interpret import run_node
from repconv_cli.graph.rules import Step, aten
from repconv_cli.graph.term import Leaf

# How many values one node may have while its Jacobian is made, in rows of samples at once.
_MOST_VALUES = 2**19

_SAME_ORDER = {
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default,
    aten.dropout.default,
}  # fmt: skip
ON_EACH_VALUE = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.addcmul.default,
}  # fmt: skip


def keeps_order(node: fx.Node) -> bool:
    """Whether the values of ``node`` are those of its input in the same order: axes of size 1 alone may be moved."""
    if node.target not in PERMUTES:
        return node.target in _SAME_ORDER
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, free = source.meta["shape"], source.meta["free"]
    moved = [axis for axis in order_of(node) if shape[axis] != 1 or free[axis]]
    return moved == sorted(moved)


def tensors_read(node: fx.Node, constants: Constants) -> list[tuple[int, ...]]:
    """Return the shapes of the constants that ``node`` reads, but for single numbers."""
    shapes = [tuple(n.meta["shape"]) for n in node.all_input_nodes if n in constants and "shape" in n.meta]
    return [shape for shape in shapes if prod(shape) > 1]


def is_same_everywhere(node: fx.Node, constants: Constants) -> bool:
    """Whether ``node`` does the same to every value, whatever its place."""
    variables = [n for n in node.all_input_nodes if n not in constants]
    return not tensors_read(node, constants) and all(n.meta["shape"] == node.meta["shape"] for n in variables)


def matrix_on_row(
    node: fx.Node, anchor: fx.Node, geometry: Geometry, constants: Constants, steps: Mapping[fx.Node, Step]
) -> ConvMap:
    """Return the Jacobian and the constant of ``node`` on one row of ``anchor``, a row of it for each output.

    A map that reads the row as it is, and whose values nothing mixes afterwards, is written out from its kernel. What
    is left is differentiated, all groups at once: ``weight[g, o, i] = d y[g, o] / d x[g, i]``.
    """
    region = region_between(anchor, node, constants)
    leaves = _leaves_on_rows(region, anchor, geometry, constants, steps)
    weight = torch.zeros(geometry.weight_shape, dtype=torch.float64)
    with torch.enable_grad():
        outputs = {source: _constant_of(leaf, geometry).requires_grad_() for source, leaf in leaves.items()}
        x = torch.zeros(1, geometry.in_channels, dtype=torch.float64, requires_grad=True)
        y = _run_rows(region, anchor, x, constants, outputs)
        left, *scales = torch.autograd.grad(y.sum(), [x, *outputs.values()], allow_unused=True)
        for (source, leaf), scale in zip(leaves.items(), scales, strict=True):
            kernel = _in_groups(leaf.kernel(), geometry.groups)
            sizes = source.args[0].meta["shape"][2 : 2 + len(kernel.geometry.axes)]  # type: ignore[union-attr]
            add_unrolled(weight, kernel.weight, kernel.geometry, sizes, scale[0])
        if left is not None:
            fixed = {source: output.detach() for source, output in outputs.items()}
            _add_jacobian(weight, region, anchor, geometry, constants, fixed)
    return ConvMap(weight, y[0].detach().clone(), geometry)


def _leaves_on_rows(
    region: list[fx.Node],
    anchor: fx.Node,
    geometry: Geometry,
    constants: Constants,
    steps: Mapping[fx.Node, Step],
) -> dict[fx.Node, Leaf]:
    """Return the maps that read a row in its order, where each of their values is then looked at by itself."""
    rows, leaves, apart = {anchor}, {}, set()
    for node in region:
        sources = [source for source in node.all_input_nodes if source not in constants]
        if rows.issuperset(sources):
            step = steps.get(node)
            if keeps_order(node):
                rows.add(node)
            elif step is not None and step.leaf is not None and _reads_a_row(step.leaf, node, geometry):
                leaves[node] = step.leaf
                apart.add(node)
        elif not apart.isdisjoint(sources):
            if not (keeps_order(node) or node.target in ON_EACH_VALUE or node.target is aten.batch_norm.default):
                return {}
            apart.add(node)
    return leaves


def _reads_a_row(leaf: Leaf, node: fx.Node, geometry: Geometry) -> bool:
    """Whether one sample of what ``node`` reads is a row, with groups that can be those of the rows."""
    own, source = leaf.geometry, node.args[0]
    assert isinstance(source, fx.Node)
    sizes = source.meta["shape"][2 : 2 + len(own.axes)]
    return (
        not own.transposed
        and (own.padding_mode == "zeros" or not own.reads_outside(sizes))
        and leaf.pad_value == 0.0
        and own.groups % geometry.groups == 0
        and own.in_channels * prod(sizes) == geometry.in_channels
        and own.out_channels * prod(own.output_sizes(sizes)) == geometry.out_channels
    )


def _in_groups(kernel: ConvMap | Kernel, groups: int) -> ConvMap | Kernel:
    if kernel.geometry.groups == groups:
        return kernel
    none = torch.zeros(kernel.geometry.out_channels, dtype=torch.float64)
    return regroup(ConvMap(kernel.weight.double(), none, kernel.geometry), groups)


def _constant_of(leaf: Leaf, geometry: Geometry) -> Tensor:
    """Return what a map gives at zero, as one row."""
    own = torch.zeros(leaf.geometry.out_channels, dtype=torch.float64) if leaf.bias is None else leaf.bias
    return own.repeat_interleave(geometry.out_channels // len(own)).reshape(1, -1)


def _add_jacobian(
    weight: Tensor,
    region: list[fx.Node],
    anchor: fx.Node,
    geometry: Geometry,
    constants: Constants,
    fixed: Mapping[fx.Node, Tensor],
) -> None:
    """Add to ``weight`` the Jacobian of a region in which some nodes have ``fixed`` rows for values."""
    groups, height, inputs = geometry.groups, geometry.out_channels // geometry.groups, geometry.in_channels
    rows = count_values(anchor) // inputs
    width = max(count_values(n) for n in (anchor, *region)) // rows
    at_once = max(min(_MOST_VALUES // max(width, 1), height), 1)
    x = torch.zeros(at_once, inputs, dtype=torch.float64, requires_grad=True)
    y = _run_rows(region, anchor, x, constants, fixed)
    matrices = weight.view(groups, height, inputs // groups)
    for first in range(0, height, at_once):
        count = min(at_once, height - first)
        cotangent = torch.zeros(at_once, groups, height, dtype=torch.float64)
        cotangent[range(count), :, range(first, first + count)] = 1.0
        (found,) = torch.autograd.grad(y, x, cotangent.flatten(1), retain_graph=True)
        matrices[:, first : first + count] += found[:count].reshape(count, groups, -1).transpose(0, 1)


def _run_rows(
    region: list[fx.Node], anchor: fx.Node, x: Tensor, constants: Constants, fixed: Mapping[fx.Node, Tensor]
) -> Tensor:
    try:
        return _run(region, anchor, x, constants, fixed)
    except RuntimeError as error:
        raise UnprovenError(f"{region[-1].name} does not run on rows of {anchor.name}: {error}") from error


def count_values(node: fx.Node) -> int:
    """Return how many values ``node`` has at the example."""
    return prod(node.meta["shape"])


def _run(
    region: list[fx.Node], anchor: fx.Node, x: Tensor, constants: Constants, fixed: Mapping[fx.Node, Tensor]
) -> Tensor:
    """Return the last node's values in rows, for rows ``x`` of the anchor."""
    values = {anchor: x}
    y = x
    for node in region:
        if node in fixed:
            values[node] = y = fixed[node].expand(len(x), -1)
            continue
        is_on_values = node.target in ON_EACH_VALUE and is_same_everywhere(node, constants)

        def fetch(source: fx.Node, node: fx.Node = node, is_on_values: bool = is_on_values) -> Any:
            if source not in values:
                return constants.as_stored(source)
            if is_on_values:
                return values[source]
            shape = source.meta["shape"]
            return values[source].reshape(-1, *(shape[-1:] if node.target is aten.linear.default else shape[1:]))

        if keeps_order(node):
            (source,) = (n for n in node.all_input_nodes if n in values)
            y = values[source]
        else:
            y = run_node(node, fetch).reshape(len(x), -1)
        values[node] = y
    return y
