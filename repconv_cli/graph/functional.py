"""Which writes in an exported graph are plain enough to be left out by renaming.

``y = x.relu_()`` means that from here on ``x`` is ``relu(x)``: in a graph, where every use is known, that is a matter
of names. It is not where the written tensor shares memory with another one that is read later (a slice that is
filled, a view), or where it belongs to the caller; those graphs go through torch's own functionalization, which
takes several times as long as the export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from repconv_cli.graph.operators import ATEN_NAMES, PYTHON_OPERATORS

aten = torch.ops.aten


def functional_form(target: Any) -> Any:
    """Return the operator that gives what an in-place operator writes, or None where there is none."""
    name = target._schema.name.partition("::")[2]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    found = getattr(packet, target._overloadname, None)
    return found if found is not None and not found._schema.is_mutable else None


# What these give lies in new memory, and their gradients do not need it.
_GIVES_NEW_MEMORY = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    aten.linear.default, aten.batch_norm.default, aten.add.Tensor, aten.addcmul.default,
}  # fmt: skip
_IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.relu6.default: aten.relu6_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
}


def in_place_form(node: fx.Node) -> Any:
    """Return the operator that writes an activation over its operand, None where anyone else may read that.

    Of a functional graph: an activation reads and writes its values once, and new memory is slower than what was just
    written.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.target not in _GIVES_NEW_MEMORY or len(source.users) > 1:
        return None
    if node.target is aten.leaky_relu.default and len(node.args) > 1 and not _is_positive(node.args[1]):
        # Of its result alone torch cannot tell what its gradient was.
        return None
    return _IN_PLACE.get(node.target)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and number > 0


def is_write(node: fx.Node) -> bool:
    """Whether ``node`` writes to a tensor that it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_renamable(graph: fx.Graph) -> bool:
    """Whether every write in ``graph`` can be left out by renaming, and every operator may stand in a program."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        owner[node] = memory_of(node, owner)
        if node.op != "call_function":
            continue
        if not _is_known(node) or _updates_statistics(node):
            return False
        if is_write(node) and not _is_plain_write(node, owner, position):
            return False
    return True


def memory_of(node: fx.Node, owner: dict[fx.Node, fx.Node]) -> fx.Node:
    """Return the node whose memory the value of ``node`` lies in, as far as is known: its own, or that of a view."""
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, fx.Node):
        return node
    if not isinstance(node.target, torch._ops.OpOverload):
        return owner[source]
    returns = node.target._schema.returns
    is_view = any(value.alias_info is not None for value in returns)
    # In eval mode dropout gives its input itself, which its schema does not say.
    return owner[source] if is_view or "dropout" in str(node.target) else node


def _is_known(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target in PYTHON_OPERATORS.values()
    namespace, _, name = node.target._schema.name.partition("::")
    is_listed = namespace == "aten" and (name in ATEN_NAMES or name in _WITHOUT_EFFECT or node.target in SHAPED_LIKE)
    return is_listed or (is_write(node) and functional_form(node.target) is not None)


# A reshape to the sizes of another tensor.
SHAPED_LIKE = {aten.reshape_as.default, aten.view_as.default}
# Left out of every program.
_WITHOUT_EFFECT = {
    "_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "sym_constrain_range", "detach",
}  # fmt: skip


def _updates_statistics(node: fx.Node) -> bool:
    """Whether a norm in training mode writes to its running statistics, which its schema does not say."""
    return node.target is aten.batch_norm.default and bool(node.args[5]) and node.args[3] is not None


def _is_plain_write(node: fx.Node, owner: dict[fx.Node, fx.Node], position: dict[fx.Node, int]) -> bool:
    written = node.args[0]
    if not isinstance(written, fx.Node) or owner[written].op != "call_function":
        return False
    value = written.meta.get("val")
    others = [source.meta.get("val") for source in node.all_input_nodes]
    if not isinstance(value, Tensor) or any(isinstance(o, Tensor) and o.dtype != value.dtype for o in others):
        return False
    same_memory = [other for other in owner if owner[other] is owner[written] and not _is_same_value(other, written)]
    return not any(
        position[user] > position[node] for other in same_memory if other is not node for user in other.users
    )


def _is_same_value(node: fx.Node, written: fx.Node) -> bool:
    """Whether ``node`` stands for the whole of what ``written`` is: itself, or what an in-place operator gave back."""
    return _whole(node) is _whole(written)


def _whole(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and (is_write(node) or node.target in _RENAMING) and node.args:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


_RENAMING = {aten.alias.default, aten.detach.default, aten.dropout.default}
