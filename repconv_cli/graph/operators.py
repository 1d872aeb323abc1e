"""The operators that a graph from a file may name: functional ATen operators on tensors and numbers, and no others.

None of them reads a file, allocates memory without filling it, or calls back into Python. What looks at nothing that
it is given runs as an operator that does (:mod:`repconv_cli.graph.recurrent`), by the same name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from repconv_cli.errors import InputError
from repconv_cli.graph.recurrent import CHECKED

_ATEN = """
_adaptive_avg_pool2d _log_softmax _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_view
_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d abs acos adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d add addcdiv addcmul addmm affine_grid_generator alias all amax amin any arange
argmax argmin argsort asin atan atan2 avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and
bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to cat ceil celu channel_shuffle chunk clamp
clamp_max clamp_min clip clone col2im complex constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution copy cos cosh cosine_similarity cross cumprod cumsum detach diagonal div
dropout einsum elu embedding eq erf exp expand expand_as expm1 fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft
fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill flatten flip floor
floor_divide fmod frac full full_like gather ge gelu getitem glu grid_sampler grid_sampler_2d group_norm gru gru_cell
gt hardshrink hardsigmoid hardswish hardtanh im2col imag index index_add index_copy index_fill index_put index_select
instance_norm isfinite isinf isnan isneginf item layer_norm le leaky_relu lerp lift_fresh_copy linalg_vector_norm
linear linspace log log10 log1p log2 log_sigmoid log_softmax logical_and logical_not logical_or logical_xor logsumexp
lstm lstm_cell lt masked_fill matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum mean
meshgrid min minimum mish mm movedim mul mv nan_to_num narrow native_batch_norm native_group_norm native_layer_norm ne
neg new_full new_ones new_zeros nonzero norm one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle
polar pow prelu prod real reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder repeat
repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape rms_norm rnn_relu rnn_relu_cell
rnn_tanh rnn_tanh_cell roll rot90 round rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add
select select_scatter selu sgn sigmoid sign silu sin sinh slice slice_scatter softmax softplus softshrink sort split
split_with_sizes sqrt square squeeze stack std std_mean sub sum sym_size take_along_dim tan tanh tanhshrink tensordot
threshold tile to topk transpose tril triu trunc type_as unbind unflatten unfold unsqueeze upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
var var_mean view view_as_complex view_as_real where zero zeros zeros_like
"""
ATEN_NAMES = frozenset(_ATEN.split())

# Arithmetic on sizes, and picking one of several results.
PYTHON_OPERATORS: dict[str, Callable[..., Any]] = {
    "size.add": operator.add,
    "size.sub": operator.sub,
    "size.mul": operator.mul,
    "size.floordiv": operator.floordiv,
    "size.mod": operator.mod,
    "size.neg": operator.neg,
    "size.pow": operator.pow,
    "size.truediv": operator.truediv,
    "size.trunc": math.trunc,
    "size.max": torch.sym_max,
    "size.min": torch.sym_min,
    "size.int": torch.sym_int,
    "size.float": torch.sym_float,
    "getitem": operator.getitem,
}
_UNCHECKED = {checked: target for target, checked in CHECKED.items()}
_PYTHON_NAMES = {function: name for name, function in PYTHON_OPERATORS.items()}


def operator_name(target: Any) -> str:
    """Return the name of an operator as files write it; raise :class:`InputError` for one that files may not hold."""
    if target in _PYTHON_NAMES:
        return _PYTHON_NAMES[target]
    name = str(_UNCHECKED.get(target, target))
    if isinstance(target, torch._ops.OpOverload) and _is_allowed(name, allow_in_place=False):
        return name
    raise InputError(
        f"the model uses the operator {name}, which the file format does not hold",
        hint="Please report the model, so that the operator can be added.",
    )


def find_operator(name: str, *, allow_in_place: bool = False) -> Callable[..., Any]:
    """Return the operator called ``name``, looked up only after its name was found in the list.

    ``allow_in_place`` admits the in-place form of a listed operator (``relu_``), for graphs that are not functional
    yet and will be made so.
    """
    if name in PYTHON_OPERATORS:
        return PYTHON_OPERATORS[name]
    if not _is_allowed(name, allow_in_place):
        raise InputError(f"operator {_shown(name)} is not among the operators that a graph may name")
    _, base, overload = name.split(".")
    packet = getattr(torch.ops.aten, base, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise InputError(f"operator {_shown(name)} is unknown to torch {torch.__version__}")
    if found._schema.is_mutable and not allow_in_place:
        raise InputError(f"operator {_shown(name)} writes to its inputs")
    return CHECKED.get(found, found)


def draws_random(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers: not what carries torch's tag for it and is told not to."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    given = {argument.name: argument.default_value for argument in target._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    return not (given.get("train") is False or given.get("training") is False or given.get("dropout_p") == 0.0)


_NORMS_WITH_STATE = {
    torch.ops.aten.batch_norm.default,
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten.instance_norm.default,
}


def writes_statistics(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a norm would update its running statistics, which its schema does not tell."""
    if target not in _NORMS_WITH_STATE:
        return False
    names = (argument.name for argument in target._schema.arguments)
    given = dict(zip(names, args, strict=False)) | kwargs
    is_fixed = given.get("training", given.get("use_input_stats")) is False
    return given.get("running_mean") is not None and not is_fixed


def _is_allowed(name: str, allow_in_place: bool) -> bool:
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not parts[2].isidentifier() or parts[2].endswith("out"):
        return False
    base = parts[1]
    if allow_in_place and base.endswith("_") and not base.startswith("_"):
        base = base[:-1]
    return base in ATEN_NAMES


def _shown(name: str) -> str:
    return repr(name[:80] + ("…" if len(name) > 80 else ""))
