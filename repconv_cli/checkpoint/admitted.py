"""The names a checkpoint's pickle may use. Read without torch; a name that is not here is refused."""

from __future__ import annotations

from collections.abc import Sequence

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8,
    "complex128": 16, "complex64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
"""Bytes in one element, for each dtype that is read here."""

DTYPE_NAMES = {**{name: name for name in ITEM_BYTES}, "double": "float64", "float": "float32", "half": "float16"}

STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
}  # fmt: skip
"""Classes in ``torch`` (or ``torch.cuda``) that a tensor's bytes are filed under, and the dtype each stands for."""

UNTYPED_STORAGE = ("torch.storage", "UntypedStorage")

MODULE_PREFIXES = ("torch.nn.modules.", "repconv_cli.training.")
"""Where a module class may come from; it is only made empty and given its state, never called."""

MODULE_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}
"""Classes around a whole model, and where they keep it. They are looked through, and never made."""

PLAIN_FUNCTIONS = frozenset(
    [("torch.nn.functional", name) for name in ("relu", "relu6", "gelu", "silu", "leaky_relu", "elu", "selu")]
    + [("torch.nn.functional", name) for name in ("hardswish", "hardsigmoid", "hardtanh", "mish", "softplus")]
    + [("torch._C._nn", name) for name in ("gelu", "silu", "softplus", "hardswish", "hardtanh", "leaky_relu")]
)
"""Activations of one tensor, which ``torch.nn`` layers keep as an attribute. Never called with the file's arguments."""

UNSUPPORTED_TENSORS = {
    ("torch._utils", "_rebuild_qtensor"): "a quantized tensor",
    ("torch._utils", "_rebuild_sparse_tensor"): "a sparse tensor",
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "a tensor on the meta device, which has no values",
    ("torch._utils", "_rebuild_nested_tensor"): "a nested tensor",
    ("torch", "QInt8Storage"): "a quantized tensor",
    ("torch", "QUInt8Storage"): "a quantized tensor",
    ("torch", "QInt32Storage"): "a quantized tensor",
}
"""Names that are harmless and stand for something that cannot be fused."""

_ACTING_MODULES = frozenset(
    [
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "shutil",
        "socket",
        "importlib",
        "runpy",
        "ctypes",
        "pty",
        "pip",
        "pickle",
        "_pickle",
        "marshal",
        "code",
        "codeop",
        "webbrowser",
        "multiprocessing",
        "urllib",
        "http",
        "pdb",
    ]
)
_PLAIN_BUILTINS = frozenset(
    [
        "object",
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "int",
        "float",
        "str",
        "bytes",
        "bytearray",
        "complex",
        "bool",
        "slice",
        "range",
        "type",
        "getattr",
    ]
)


def is_acting(path: str) -> bool:
    """Whether a name stands for something that acts on the machine, which no record of a training run needs.

    Nothing that a file names is ever run, whatever this says: it only tells an attack from a record.

    >>> is_acting("posix.system"), is_acting("builtins.eval"), is_acting("argparse.Namespace")
    (True, True, False)
    """
    module, _, name = path.rpartition(".")
    return module.split(".")[0] in _ACTING_MODULES or (module == "builtins" and name not in _PLAIN_BUILTINS)


# Python 2 and pickle protocols 0 to 2 call these modules by their old names.
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def is_module_class(module: str, name: str, trusted: Sequence[str] = ()) -> bool:
    """Return whether this may be a class of modules, judged by where it says it comes from.

    ``trusted`` are package names that the user vouches for.

    >>> is_module_class("torch.nn.modules.conv", "Conv2d"), is_module_class("torch.nn.modules_evil", "X")
    (True, False)
    >>> is_module_class("timm.layers.norm_act", "BatchNormAct2d", trusted=["timm"])
    True
    """
    if f"{module}.{name}" in MODULE_WRAPPERS:
        return True
    if not name.isidentifier() or name.startswith("__"):
        return False
    # Classes of a TorchScript archive are names in it alone; nothing of ours or Python's is called so.
    if module.split(".")[0] == "__torch__":
        return "__torch__" in trusted
    if not all(part.isidentifier() and not part.startswith("__") for part in module.split(".")):
        return False
    return module.startswith(MODULE_PREFIXES) or any(
        module == package or module.startswith(f"{package}.") for package in trusted
    )
