"""A model in onnxruntime: what it is called with, and what it gives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError
from repconv_cli.onnx.values import DTYPES, from_numpy, to_numpy

if TYPE_CHECKING:
    from onnx import ModelProto

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


class Session:
    """One model loaded into onnxruntime, on the CPU. Files beside it are looked for in ``folder``.

    Raises :class:`InputError` where onnxruntime does not take the model.
    """

    def __init__(self, model: ModelProto, folder: Path, *, is_optimised: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Errors come as exceptions; what it says of its own work is not for our users.
        options.log_severity_level = 4
        options.intra_op_num_threads = min(os.cpu_count() or 1, torch.get_num_threads())
        options.add_session_config_entry(_EXTERNAL_FOLDER, os.path.realpath(folder))
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if is_optimised else levels.ORT_DISABLE_ALL
        try:
            data = model.SerializeToString()
            self._session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise InputError(f"onnxruntime does not load it: {one_line(error)}") from error
        self.inputs = [info.name for info in self._session.get_inputs()]
        self.outputs = [info.name for info in self._session.get_outputs()]
        # numpy has no such numbers: onnxruntime takes and gives them in a form of its own.
        halves = {info.name for info in self._session.get_inputs() if info.type == "tensor(bfloat16)"}
        if halves:
            raise InputError(f"onnxruntime cannot be given bfloat16, the type of its input {quoted(sorted(halves)[0])}")

    def run(self, feed: dict[str, Tensor], wanted: Iterable[str] | None = None) -> list[Any]:
        """Return the outputs as tensors (lists of them for sequences)."""
        arrays = {name: to_numpy(tensor) for name, tensor in feed.items() if name in self.inputs}
        try:
            found = self._session.run(None if wanted is None else list(wanted), arrays)
        except Exception as error:
            raise InputError(f"onnxruntime does not run it: {one_line(error)}") from error
        return [from_numpy(value) for value in found]


def one_line(error: BaseException) -> str:
    """Return the first line of what a library said, cut, without control characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return quoted(lines[0] if lines else type(error).__name__, limit=200)


def element_dtype(number: int) -> torch.dtype | None:
    """Return torch's type for ONNX's number of an element type."""
    return DTYPES.get(number)
