"""ONNX tensors as torch tensors, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError
from repconv_cli.onnx.external import extent_of, is_external

if TYPE_CHECKING:
    from onnx import TensorProto

# ONNX's numbers for element types.
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
ELEMENT_TYPES = {dtype: number for number, dtype in DTYPES.items()}
DOUBLED = {1, 10, 16}
"""Element types that are computed in float64 where a run is to be exact."""
DOUBLE = 11


def tensor_of(proto: TensorProto, folder: Path) -> Tensor | None:
    """Return the values of ``proto``, None for an element type that torch does not have (text, 4-bit numbers).

    Raises :class:`DamagedFileError` where its values are not as many as its shape says.
    """
    dtype = DTYPES.get(proto.data_type)
    if dtype is None:
        return None
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**48:
        raise DamagedFileError(f"tensor {quoted(proto.name)} has the shape {quoted(shape)}")
    if is_external(proto):
        return _from_bytes(extent_of(proto, folder, math.prod(shape) * dtype.itemsize).read(), dtype, shape)
    from onnx import numpy_helper

    try:
        found = numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise DamagedFileError(
            f"tensor {quoted(proto.name)} does not hold the values of its shape {quoted(shape)}"
        ) from error
    return _from_bytes(bytearray(np.ascontiguousarray(found).tobytes()), dtype, shape)


def _from_bytes(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def proto_of(name: str, tensor: Tensor) -> TensorProto:
    """Return ``tensor`` as an initializer called ``name``, its values inside."""
    import onnx

    return onnx.TensorProto(
        name=name, data_type=ELEMENT_TYPES[tensor.dtype], dims=tuple(tensor.shape), raw_data=bytes_of(tensor)
    )


def bytes_of(tensor: Tensor) -> bytes:
    """Return the values of ``tensor`` as files hold them: little-endian, the last axis first."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def to_numpy(value: Any) -> Any:
    """Return a tensor (or a list of them) as numpy arrays; what numpy has no type for becomes float32."""
    if isinstance(value, (list, tuple)):
        return [to_numpy(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def from_numpy(value: Any) -> Any:
    """Return a numpy array or number (or a list of them) as a tensor; raise :class:`InputError` for text."""
    if isinstance(value, list):
        return [from_numpy(item) for item in value]
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise InputError(f"values of the type {array.dtype} cannot be computed with")
    return torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
