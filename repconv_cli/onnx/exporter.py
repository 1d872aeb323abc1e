"""torch's own ONNX exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

if TYPE_CHECKING:
    from onnx import ModelProto

_attention = torch.ops.aten.scaled_dot_product_attention.default


def to_onnx(exported: ExportedProgram, input_names: list[str] | None = None) -> ModelProto:
    """Return an exported program as an ONNX model. What the exporter raises, in any form, goes through."""
    with torch.no_grad():
        known = _unguarded(_unguarded(exported).run_decompositions({_attention: _attention_of_four_axes}))
        found = torch.onnx.export(known, dynamo=True, verbose=False, input_names=input_names)
    assert found is not None
    return found.model_proto


def _unguarded(exported: ExportedProgram) -> ExportedProgram:
    """Take from ``exported`` the conditions on its sizes, and return it: they were judged when it was exported.

    Torch would run them as code, and cannot where they name an input by a keyword.
    """
    exported._guards_code = []
    return exported


def cause_of(error: BaseException) -> BaseException:
    """Return what an error of the exporter began with: its own text is advice to those who write exporters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _attention_of_four_axes(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """Return attention with its leading axes made two, all that the exporter takes: each matrix is attended by itself.

    Exact: the same arithmetic on the same numbers.
    """
    leading = query.shape[:-2]
    if len(leading) in (0, 2) or key.shape[:-2] != leading or value.shape[:-2] != leading:
        return NotImplemented  # type: ignore[no-any-return] # so a decomposition leaves a node as it is
    if attn_mask is not None and attn_mask.ndim > 2:
        attn_mask = _two_leading(attn_mask.expand(*leading, *attn_mask.shape[-2:]))
    found: Tensor = _attention(*map(_two_leading, (query, key, value)), attn_mask, *rest, **options)
    return found.reshape(*leading, *found.shape[-2:])


def _two_leading(x: Tensor) -> Tensor:
    two: Tensor = x[None] if x.ndim == 3 else x.flatten(0, -4)
    return two
