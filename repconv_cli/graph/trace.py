"""Turn a module and example inputs into a :class:`~repconv_cli.graph.program.Program`."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from repconv_cli.errors import TraceError
from repconv_cli.graph.batches import MOST_SAMPLES, MOST_SPECIAL, Call, is_same_at, lengths_are_sizes
from repconv_cli.graph.export import Exported, MayVary, export, export_fixed, export_usual
from repconv_cli.graph.functional import SHAPED_LIKE, functional_form, is_write, memory_of
from repconv_cli.graph.guards import Conditions
from repconv_cli.graph.kept import in_eval_mode, quiet
from repconv_cli.graph.operators import draws_random
from repconv_cli.graph.program import InputInfo, Program, Structure
from repconv_cli.graph.recurrent import CHECKED

aten = torch.ops.aten

_DROPPED = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_NORMS = {aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.no_stats}
# In a functional graph these give their first argument's values under another name.
_ALIASES = {aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default}
# Casts, which give what they are given where that is of the dtype already.
_CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
# Several names for one operator.
_SYNONYMS = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    **CHECKED,
}
# A view demands a memory layout, which fusing (or the user, with ``channels_last``) may change; a reshape takes any.
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def trace(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    may_vary: tuple[tuple[bool, ...], ...] | None = None,
) -> Program:
    """Return the functional graph of ``module`` in eval mode on example ``args``, tensors by their own names.

    Sizes that the graph does not depend on stay free: the batch and the spatial sizes, or those that ``may_vary``
    (per input tensor and axis) admits.
    The module is put in eval mode for the trace and given back as it was. Raises :class:`TraceError` in one line
    where torch cannot make a graph of it.
    """
    kwargs = kwargs or {}
    with in_eval_mode(module), torch.no_grad(), quiet(), lengths_are_sizes(module):
        exported = export(module, args, kwargs, may_vary)
        program = _to_program(exported)
        if not exported.special or (call := Call.of(args, kwargs)) is None:
            return program
        return _of_any_batch(program, exported.special, module, call, may_vary) or program


def _of_any_batch(
    own: Program, special: frozenset[int], module: nn.Module, call: Call, may_vary: MayVary
) -> Program | None:
    """Return the program for any batch, traced at one that is not ``special``; None where that is not proven.

    ``own`` is the program at the call's own batch.
    """
    usual = next(batch for batch in itertools.count(call.batch) if batch not in special)
    found = export_usual(module, *call.of_batch(usual), may_vary)
    if found is None or len(found.special) > MOST_SPECIAL or max(found.special, default=0) > MOST_SAMPLES:
        return None
    program = _to_program(found)

    def at(batch: int) -> Program:
        return own if batch == call.batch else _to_program(export_fixed(module, *call.of_batch(batch)))

    return program if all(is_same_at(batch, program, at(batch)) for batch in sorted(found.special)) else None


def _to_program(found: Exported) -> Program:
    """Copy the exported graph: lifted tensors become ``get_attr`` nodes by key, metadata becomes plain values."""
    exported = found.program
    signature = exported.graph_signature
    keys = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise TraceError(f"the model writes to {written[0]} while it runs", needed="a forward without side effects")
    stored = {**exported.state_dict, **exported.constants}
    copier = _Copier(keys)
    inputs: list[InputInfo] = []
    for node in exported.graph.nodes:
        copier.copy(node)
        if node.op == "placeholder" and node.name not in keys:
            inputs.append(_input_info(node, found.conditions))
    graph = copier.graph
    graph.eliminate_dead_code()
    _check_sizes(graph)
    in_args, in_kwargs = Structure.of(exported.call_spec.in_spec).children
    tensors = {key: stored[key].detach() for key in dict.fromkeys(keys.values()) if isinstance(stored.get(key), Tensor)}
    return Program(
        graph=graph,
        tensors=tensors,
        parameters=frozenset(signature.inputs_to_parameters.values()),
        inputs=tuple(inputs),
        arguments=in_args,
        keywords=in_kwargs,
        outputs=Structure.of(exported.call_spec.out_spec),
        notes=found.notes,
    )


def _input_info(node: fx.Node, needed: Conditions) -> InputInfo:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise TraceError(f"input {node.name} is a {type(value).__name__}", needed="tensors as inputs")
    sizes, free = _sizes(value)
    example = tuple(size for size in sizes if size is not None)
    shape = tuple(None if is_free else size for size, is_free in zip(sizes, free, strict=True))
    # torch takes a free size for more than one, and says nothing of one; a batch of one is looked at by itself.
    smallest = tuple(
        max(needed.bounds.get((node.name, axis), 1), min(axis, 1) + 1) if is_free else 1
        for axis, is_free in enumerate(free)
    )
    same_as = tuple(needed.same_as(node.name, axis) if is_free else "" for axis, is_free in enumerate(free))
    return InputInfo(
        str(node.target),
        shape,
        example,
        value.dtype,
        smallest if max(smallest, default=1) > 1 else (),
        same_as if any(same_as) else (),
    )


def _sizes(value: Tensor) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Return (sizes at the example, which are free) of a fake tensor; None is a size that depends on the data."""
    free = tuple(isinstance(size, torch.SymInt) for size in value.shape)
    return tuple(_hint(size) for size in value.shape), free


def _hint(size: int | torch.SymInt) -> int | None:
    """Return a size at the example; None for one that depends on the data."""
    if not isinstance(size, torch.SymInt):
        return size
    return None if size.node.hint is None else int(str(size.node.hint))


def _check_sizes(graph: fx.Graph) -> None:
    """Refuse a graph that still computes with sizes that depend on the data (what a dropped assertion read is gone)."""
    for node in graph.nodes:
        if None in (*node.meta.get("shape", ()), node.meta.get("size", 0)):
            place = node.meta.get("module") or node.name
            raise TraceError(
                f"the size of {node.name} in {place} depends on the values of the input",
                needed="sizes that depend on the input's sizes alone",
                hint="Give an --arch callable that returns the part of the model before it.",
            )


class _Copier:
    """Copies an exported graph node by node, leaving out what does nothing in a functional graph."""

    def __init__(self, keys: dict[str, str]) -> None:
        self.keys = keys
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.owner: dict[fx.Node, fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        if node.op == "call_function":
            _require_function(node)
        self.owner[node] = memory_of(node, self.owner)
        if node.op == "placeholder" and node.name in self.keys:
            self.env[node] = self.graph.get_attr(self.keys[node.name])
        elif node.op == "get_attr":
            raise TraceError("the model branches on data (a sub-graph in the trace)", needed="one straight graph")
        elif node.op == "call_function" and node.target in _DROPPED:
            return
        elif (alias := self._alias(node)) is not None:
            self.env[node] = alias
            return
        elif node.op == "call_function" and node.target in _NORMS:
            self.env[node] = self._batch_norm(node)
        elif node.op == "call_function" and node.target in SHAPED_LIKE:
            self.env[node] = self._reshape_as(node)
        else:
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
            self.env[node].target = self._target(node)
        self._describe(node, self.env[node])
        if node.op == "call_function" and is_write(node):
            self._rename(node)

    def _reshape_as(self, node: fx.Node) -> fx.Node:
        """Return a reshape that reads its sizes, not the tensor that has them."""
        x, other = (self.env[source] for source in node.args[:2])  # type: ignore[index]
        sizes: list[int | fx.Node] = []
        for axis, size in enumerate(node.meta["val"].shape):
            sizes.append(self._size(other, axis, size) if isinstance(size, torch.SymInt) else size)
        return self.graph.call_function(aten.reshape.default, (x, sizes))

    def _size(self, tensor: fx.Node, axis: int, size: torch.SymInt) -> fx.Node:
        found = self.graph.call_function(aten.sym_size.int, (tensor, axis))
        found.meta = {"module": "", "is_size": True, "size": _hint(size)}
        return found

    def _target(self, node: fx.Node) -> Any:
        if node.target in _VIEWS:
            return aten.reshape.default
        if node.target in _SYNONYMS:
            return _SYNONYMS[node.target]
        return functional_form(node.target) if node.op == "call_function" and is_write(node) else node.target

    def _rename(self, node: fx.Node) -> None:
        """Let every name of the tensor that ``node`` writes to stand for what it wrote."""
        before = self.env[node.args[0]]  # type: ignore[index]
        for name, value in self.env.items():
            if value is before and self.owner[name] is self.owner[node]:
                self.env[name] = self.env[node]

    def _alias(self, node: fx.Node) -> Any:
        """Return what ``node`` merely renames, or None."""
        if node.op != "call_function":
            return None
        if node.target in _ALIASES or _is_dropout_in_eval_mode(node):
            return self.env[node.args[0]]  # type: ignore[index]
        source = node.args[0] if node.args else None
        if node.target in _CASTS and isinstance(source, fx.Node) and _is_same_kind(node, source):
            return self.env[source]
        if node.target is operator.getitem and isinstance(source, fx.Node) and source.target in _NORMS:
            return self.env[source] if node.args[1] == 0 else None
        if node.target is aten.slice.Tensor and _is_whole(node.args[1:]):
            return self.env[node.args[0]]  # type: ignore[index]
        if node.target is aten.slice_scatter.default and _is_whole(node.args[2:]):
            return self.env[node.args[1]]  # type: ignore[index]
        if node.target is aten.copy.default and _same_value(node.args[0], node.args[1]):
            return self.env[node.args[1]]  # type: ignore[index]
        return None

    def _batch_norm(self, node: fx.Node) -> fx.Node:
        """Return a norm as the one operator that it was, instead of one of three results."""
        operands = [self.env.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        if node.target is aten._native_batch_norm_legit.no_stats:
            x, gamma, beta, _, momentum, eps = operands
            statistics: tuple[Any, ...] = (None, None, True)
        else:
            x, gamma, beta, mean, var, momentum, eps = operands
            statistics = (mean, var, False)
        return self.graph.call_function(aten.batch_norm.default, (x, gamma, beta, *statistics, momentum, eps, False))

    def _describe(self, node: fx.Node, copy: Any) -> None:
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)) and copy.target is aten.batch_norm.default:
            value = value[0]
        copy.meta = {"module": _path(node)}
        if isinstance(value, Tensor):
            copy.meta["shape"], copy.meta["free"] = _sizes(value)
            copy.meta["dtype"] = value.dtype
        elif isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            copy.meta["is_size"] = True
            copy.meta["size"] = _hint(value)


def _require_function(node: fx.Node) -> None:
    """Refuse a call whose value the inputs alone do not decide."""
    if draws_random(node.target, node.args, node.kwargs):
        raise TraceError(
            f"{node.name} in {_path(node) or 'the model'} draws random numbers in eval mode",
            needed="outputs that the inputs alone decide",
        )


def _path(node: fx.Node) -> str:
    """Return the path of the module that made a node of an exported graph."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack and not stack[-1][0].startswith("_empty") else ""


def _is_dropout_in_eval_mode(node: fx.Node) -> bool:
    return node.target in _DROPOUTS and not (node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True))


def _is_same_kind(node: fx.Node, source: fx.Node) -> bool:
    after, before = node.meta.get("val"), source.meta.get("val")
    return (
        isinstance(after, Tensor)
        and isinstance(before, Tensor)
        and (after.dtype, after.device, after.layout) == (before.dtype, before.device, before.layout)
    )


def _is_whole(window: tuple[Any, ...]) -> bool:
    """Whether a slice window (dim, start, end, step) takes everything."""
    defaults = (0, 0, None, 1)
    start, end, step = (window[i] if i < len(window) else defaults[i] for i in (1, 2, 3))
    return start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= 2**31))


def _same_value(target: Any, source: Any) -> bool:
    left, right = target.meta.get("val"), source.meta.get("val")
    return (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.dtype == right.dtype
        and str(left.shape) == str(right.shape)
    )
