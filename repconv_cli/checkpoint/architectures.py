"""``--arch`` and ``config.json``: the module that weights belong to, made by the user's own code or a library's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repconv_cli.checkpoint.bounded import no_larger_than
from repconv_cli.checkpoint.hub_config import ModelConfig, read_config
from repconv_cli.checkpoint.importing import import_library, library_code
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.transformers_models import input_name, make_transformers
from repconv_cli.checkpoint.ultralytics_models import make_ultralytics
from repconv_cli.errors import InputError, RepconvError

FORMS = "file.py:callable, timm:NAME, torchvision:NAME, transformers:DIR or ultralytics:YAML"

_OPTION = re.compile(r"[a-z][a-z0-9_]{0,60}")


@dataclass(frozen=True)
class Architecture:
    """A module with random weights, and what is known of its input: its size without the batch, and its keyword."""

    module: nn.Module
    input_size: tuple[int, ...] | None = None
    input_name: str | None = None
    notes: tuple[str, ...] = ()


def make_architecture(arch: str) -> Architecture:
    """Return the module that ``arch`` names, in one of the ``FORMS``; options follow a name with commas.

    This runs the code of that file or library, which is the user's own choice; nothing of a checkpoint is run.

    Raises:
        InputError: there is no such file or model, or making it fails.
    """
    library, _, name = arch.partition(":")
    try:
        if library == "transformers":
            config = read_config(Path(name) / "config.json" if os.path.isdir(name) else Path(name))
            return _checked(arch, _from_config(config))
        if library in ("timm", "torchvision", "ultralytics"):
            name, *options = name.split(",")
            made = _make(library, name, _options(options))
            return _checked(arch, Architecture(made, _size_in_timm(made) if library == "timm" else None))
        place, _, name = arch.rpartition(":")
        if not place or not name:
            raise InputError(f"--arch {quoted(arch)}", needed=FORMS)
        name, *options = name.split(",")
        return _checked(arch, Architecture(_from_file(Path(place), name)(**_options(options, is_own=True))))
    except RepconvError:
        raise
    except Exception as error:
        raise InputError(
            f"--arch {quoted(arch)} failed: {type(error).__name__}: {quoted(str(error), limit=200)}",
            hint=_hint(library),
        ) from error


def from_config(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Architecture:
    """Return the model that a ``config.json`` beside ``tensors`` describes, made by the installed library's own class.

    Raises:
        InputError: the library is not installed, does not know the model, or cannot make it.
        DamagedFileError: the model would be far larger than its weights.
    """
    with no_larger_than(tensors):
        return _from_config(config)


def _from_config(config: ModelConfig) -> Architecture:
    note = f"{quoted(config.name)} of the installed {config.library}, as config.json describes it"
    try:
        if config.library == "transformers":
            module = make_transformers(config)
            size = config.input_size
            return Architecture(module, size, input_name(module), (note,))
        return Architecture(_make("timm", config.name, config.values), config.input_size, None, (note,))
    except RepconvError:
        raise
    except Exception as error:
        raise InputError(
            f"{config.library} cannot make a {quoted(config.name)} from config.json: "
            f"{type(error).__name__}: {quoted(str(error), limit=200)}",
            hint="Install the version that saved it, or give the architecture with --arch.",
        ) from error


def _make(library: str, name: str, given: Mapping[str, Any]) -> Any:
    options = dict(given)
    package = import_library({"torchvision": "torchvision.models"}.get(library, library), f"--arch {library}:…")
    with library_code():
        if library == "ultralytics":
            return make_ultralytics(name, options)
        if library == "torchvision":
            if _has_backbone(package, name):
                options["weights_backbone"] = None
            return package.get_model(name, weights=None, **options)
        if re.search(r"[:/\\]", name):
            raise InputError(f"--arch timm:{quoted(name)}", needed="the name of an architecture of timm")
        return package.create_model(name, pretrained=False, **options)


def _size_in_timm(module: Any) -> tuple[int, ...] | None:
    size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
    channels = getattr(module, "in_chans", None) or (size[0] if size else None)
    return (int(channels), *size[1:]) if size and channels else None


def _has_backbone(package: Any, name: str) -> bool:
    # Detection and segmentation models fetch the weights of their backbone unless told not to.
    return "weights_backbone" in inspect.signature(package.get_model_builder(name)).parameters


def _checked(arch: str, made: Architecture) -> Architecture:
    if not isinstance(made.module, nn.Module):
        raise InputError(f"--arch {quoted(arch)} gave a {type(made.module).__name__}", needed="an nn.Module")
    return made


def _hint(library: str) -> str:
    if library in ("timm", "torchvision", "ultralytics"):
        return f"Options follow the name, such as {library}:NAME,num_classes=10."
    return "The callable must return an nn.Module. Options follow its name, such as net.py:make,width=8."


_CONSTANTS = {"True": True, "False": False, "None": None}


def _options(texts: list[str], *, is_own: bool = False) -> dict[str, Any]:
    """Return what ``key=value`` texts say; a value is a number, true, false or none, and a text otherwise.

    A library would fetch weights for some keys, code of the user's own (``is_own``) does as it likes.
    """
    options: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        fetches = not is_own and key.startswith(("pretrained", "checkpoint", "weights"))
        if not _OPTION.fullmatch(key) or not value or fetches:
            raise InputError(
                f"the option {quoted(text)} after the architecture", needed="key=value, such as num_classes=10"
            )
        try:
            options[key] = _CONSTANTS[value] if value in _CONSTANTS else json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _from_file(path: Path, name: str) -> Any:
    if not os.path.isfile(path):
        raise InputError(f"--arch: no such file: {quoted(str(path))}", needed=FORMS)
    spec = importlib.util.spec_from_file_location(f"_repconv_arch_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--arch: {quoted(str(path))} is no Python file", needed=FORMS)
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
        what = near(name, dir(module)) if found is None else f", but a {type(found).__name__}"
        raise InputError(f"--arch: {quoted(str(path))} has no callable {quoted(name)}{what}")
    return found


def near(name: str, names: list[str]) -> str:
    """Return "; did you mean …?" for the name nearest to ``name``, or nothing."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"; did you mean {quoted(found[0])}?" if found else ""
