"""torch's own ONNX exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

if TYPE_CHECKING:
    from onnx import ModelProto


def to_onnx(exported: ExportedProgram, input_names: list[str] | None = None) -> ModelProto:
    """Return an exported program as an ONNX model. What the exporter raises, in any form, goes through."""
    with torch.no_grad():
        found = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=input_names)
    assert found is not None
    return found.model_proto
