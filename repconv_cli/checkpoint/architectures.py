"""``--arch``: the module that weights belong to, made by the user's own code or by an installed library."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError

_LIBRARIES = ("timm", "torchvision")
_FORMS = "file.py:callable, timm:NAME or torchvision:NAME"


def make_architecture(arch: str) -> nn.Module:
    """Return the module that ``arch`` names: ``file.py:callable``, ``timm:NAME`` or ``torchvision:NAME``.

    This runs the code of that file or library, which is the user's own choice; nothing of a checkpoint is run.
    """
    place, _, name = arch.rpartition(":")
    if not place or not name:
        raise InputError(f"--arch {quoted(arch)}", needed=_FORMS)
    make = _library(place, name) if place in _LIBRARIES else _from_file(Path(place), name)
    try:
        module = make()
    except Exception as error:
        raise InputError(
            f"--arch {quoted(arch)} failed: {type(error).__name__}: {quoted(str(error))}",
            hint="The callable must take no arguments and return an nn.Module.",
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"--arch {quoted(arch)} gave a {type(module).__name__}", needed="an nn.Module")
    return module


def _from_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise InputError(f"--arch: no such file: {quoted(str(path))}", needed=_FORMS)
    spec = importlib.util.spec_from_file_location(f"_repconv_arch_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--arch: {quoted(str(path))} is no Python file", needed=_FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    # The file may import its neighbours, as it could when run from its own folder.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"--arch: {quoted(str(path))} failed: {type(error).__name__}: {quoted(str(error))}") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"--arch: {quoted(str(path))} has no callable {quoted(name)}{_near(name, dir(module))}")
    return found


def _library(library: str, name: str) -> Any:
    try:
        if library == "timm":
            timm = importlib.import_module("timm")
            return lambda: timm.create_model(name, pretrained=False)
        models = importlib.import_module("torchvision.models")
        return lambda: models.get_model(name, weights=None)
    except ImportError as error:
        raise InputError(
            f"--arch {library}:… needs {library}, which is not installed", hint=f"pip install {library}"
        ) from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load ``tensors`` into ``module`` strictly, the module taking the dtype that the weights have.

    Raises :class:`InputError` that names what is missing, unexpected, or of another shape or kind of number.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    if missing or unexpected:
        raise InputError("the weights do not belong to this architecture: " + _key_trouble(missing, unexpected))
    wrong = [key for key in own if own[key].shape != tensors[key].shape]
    if wrong:
        key = wrong[0]
        raise InputError(
            f"tensor {quoted(key)} has shape {tuple(tensors[key].shape)}"
            + (f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""),
            needed=f"{tuple(own[key].shape)} for this architecture",
        )
    # torch would convert them, and drop what the other type cannot hold.
    converted = [key for key in own if own[key].is_floating_point() and not tensors[key].is_floating_point()]
    if converted:
        key = converted[0]
        found = f"tensor {quoted(key)} holds {str(tensors[key].dtype).removeprefix('torch.')} numbers"
        raise InputError(found, needed="floating-point numbers for this architecture")
    module.to(dtype=_weight_dtype(tensors))
    module.load_state_dict(tensors, strict=True)


def _weight_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _key_trouble(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)}{_near(missing[0], unexpected)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    return ", ".join(parts)


def _some(keys: list[str]) -> str:
    return ", ".join(quoted(key) for key in keys[:3]) + (", …" if len(keys) > 3 else "")


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"; did you mean {quoted(near[0])}?" if near else ""
