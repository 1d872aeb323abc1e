"""Operators on each value by itself: norms, sums, scales, copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repconv_cli.algebra import batch_norm_scale_and_shift
from repconv_cli.errors import InexactError
from repconv_cli.graph.rules.registry import Call, Step, aten, rule
from repconv_cli.graph.term import Anchor, Term
from repconv_cli.graph.terms import add_terms, scale_term


@rule(aten.batch_norm.default)
def batch_norm(call: Call) -> Step | None:
    """A batch norm in eval mode is one scale and shift per channel, ``scale = gamma / sqrt(var + eps)``."""
    x = call.variable(call.operand(0))
    values = tuple(call.operand(index) for index in range(1, 5))
    if x is None:
        return None
    if call.operand(5) or values[2] is None or values[3] is None:
        raise InexactError("batch norm over the batch's own statistics, not running ones: not a constant map")
    if not all(value is None or call.is_constant(value) for value in values):
        return None
    eps = float(call.operand(7))

    def combine(terms: tuple[Term, ...], anchor: Anchor) -> Term:
        gamma, beta, mean, var = (None if value is None else call.tensor(value) for value in values)
        assert mean is not None
        assert var is not None
        scale, shift = batch_norm_scale_and_shift(gamma, beta, mean, var, eps)
        return scale_term(terms[0], scale, shift, 1, anchor)

    return Step((x,), combine)


@rule(
    aten.instance_norm.default,
    aten.group_norm.default,
    aten.native_group_norm.default,
    aten.layer_norm.default,
    aten.native_layer_norm.default,
)
def norm_over_sample(call: Call) -> Step | None:
    """A norm over the sample itself is no constant map."""
    del call
    raise InexactError("a norm over the sample itself (instance, layer, group) depends on the input")


@rule(aten.add.Tensor, aten.add.Scalar)
def add(call: Call) -> Step | None:
    """``a + alpha * b``: a sum of two branches merges them; with a constant it shifts."""
    return _weighted_sum(call, 1.0, _alpha(call))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def subtract(call: Call) -> Step | None:
    """``a - alpha * b``."""
    return _weighted_sum(call, 1.0, -_alpha(call))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def subtract_from(call: Call) -> Step | None:
    """``rsub(a, b)`` is ``b - alpha * a``."""
    return _weighted_sum(call, -_alpha(call), 1.0)


def _alpha(call: Call) -> float:
    alpha = call.operand(2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise InexactError("a sum weighted by a number that is computed while the model runs")
    return float(alpha)


def _weighted_sum(call: Call, first: float, second: float) -> Step | None:
    """Return the step of ``first * a + second * b``."""
    left, right = call.operand(0), call.operand(1)
    a, b = call.variable(left), call.variable(right)
    if a is not None and b is not None:
        if a.meta["shape"] != b.meta["shape"]:
            raise InexactError("branches of different shapes are added: one is repeated over the other's positions")

        def combine(terms: tuple[Term, ...], anchor: Anchor) -> Term:
            scaled = [_times(term, weight, anchor) for term, weight in zip(terms, (first, second), strict=True)]
            return add_terms(scaled[0], scaled[1], anchor)

        return Step((a, b), combine)
    variable, constant, weight, other = (a, right, first, second) if a is not None else (b, left, second, first)
    split = _per_channel(call, constant)
    if variable is None or split is None or variable.meta["shape"] != call.node.meta["shape"]:
        if variable is not None and call.is_constant(constant):
            raise InexactError("a constant that differs from place to place is added")
        return None
    axis, value = split
    return Step((variable,), lambda terms, anchor: scale_term(terms[0], weight, other * value, axis, anchor))


def _times(term: Term, weight: float, anchor: Anchor) -> Term:
    return term if weight == 1.0 else scale_term(term, weight, 0.0, None, anchor)


@rule(aten.mul.Tensor, aten.mul.Scalar)
def multiply(call: Call) -> Step | None:
    """A product with one constant per channel scales."""
    left, right = call.operand(0), call.operand(1)
    return _scaled(call, left, right) if call.variable(left) is not None else _scaled(call, right, left)


@rule(aten.div.Tensor, aten.div.Scalar)
def divide(call: Call) -> Step | None:
    """A quotient by one constant per channel scales."""
    return _scaled(call, call.operand(0), call.operand(1), is_quotient=True)


def _scaled(call: Call, variable: Any, constant: Any, *, is_quotient: bool = False) -> Step | None:
    x = call.variable(variable)
    split = _per_channel(call, constant)
    if x is None or split is None or x.meta["shape"] != call.node.meta["shape"]:
        if x is not None and call.is_constant(constant):
            raise InexactError("a scale that differs from place to place")
        return None
    axis, value = split
    if is_quotient and not bool(torch.as_tensor(value).all()):
        return None
    factor = 1.0 / value if is_quotient else value
    return Step((x,), lambda terms, anchor: scale_term(terms[0], factor, 0.0, axis, anchor))


def _per_channel(call: Call, operand: Any) -> tuple[int | None, Tensor | float] | None:
    """Return (channel axis, value) of a constant that varies along one axis at most, None if it is no such constant."""
    value = call.number_or_tensor(operand)
    if value is None or isinstance(value, float):
        return None if value is None else (None, value)
    if value.is_complex():
        return None
    ndim = call.ndim
    full = value.reshape((1,) * (ndim - value.ndim) + tuple(value.shape))
    varying = [i for i, size in enumerate(full.shape) if size > 1 and bool((full != full.narrow(i, 0, 1)).any())]
    if not varying:
        return None, float(full.flatten()[0])
    axis = varying[0]
    if len(varying) > 1 or axis not in (1, ndim - 1) or full.dtype != torch.float64:
        return None
    return axis, full[tuple(slice(None) if i == axis else 0 for i in range(ndim))].clone()


@rule(aten.addcmul.default)
def scale_and_shift(call: Call) -> Step | None:
    """``shift + value * x * scale`` with constants: what a norm alone is written as."""
    shift, first, second = (call.operand(index) for index in range(3))
    variable, constant = (first, second) if call.variable(first) is not None else (second, first)
    x, scale, added = call.variable(variable), _per_channel(call, constant), _per_channel(call, shift)
    if x is None or scale is None or added is None or x.meta["shape"] != call.node.meta["shape"]:
        return None
    factor = scale[1] * float(call.operand(3, "value", 1))

    def combine(terms: tuple[Term, ...], anchor: Anchor) -> Term:
        scaled = scale_term(terms[0], factor, 0.0, scale[0], anchor)
        return scale_term(scaled, 1.0, added[1], added[0], anchor)

    return Step((x,), combine)


@rule(aten.neg.default)
def negate(call: Call) -> Step | None:
    """A negation scales by -1."""
    x = call.variable(call.operand(0))
    return None if x is None else Step((x,), lambda terms, anchor: scale_term(terms[0], -1.0, 0.0, None, anchor))


@rule(aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.copy.default, aten.dropout.default)
def same_values(call: Call) -> Step | None:
    """A copy, or dropout in eval mode, changes nothing. (A cast does: ``describe`` compares dtypes.)"""
    if call.node.target is aten.dropout.default and call.operand(2):
        raise InexactError("dropout in training mode")
    x = call.variable(call.operand(1 if call.node.target is aten.copy.default else 0))
    if x is None or x.meta["shape"] != call.node.meta["shape"]:
        return None
    return Step((x,), lambda terms, _: terms[0])
