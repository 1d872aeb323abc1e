"""An ultralytics model made from a YAML: one of the installed package, or a file that is checked first.

The library evaluates some texts of the file and calls whatever it names. So a file of the user's own may name
modules alone, which is checked against the installed package; the package's own files are taken as they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from repconv_cli.checkpoint.importing import import_library
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.errors import InputError, UnsafeFileError

MOST_YAML_BYTES = 1 << 20

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,100}\.ya?ml")
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_.-]{0,60}")
_ACTIVATION = re.compile(r"(torch\.)?nn\.[A-Za-z0-9]{1,40}\(\)")
_FETCHING = frozenset(["TorchVision"])
_CLASSES = {
    "Classify": "ClassificationModel", "Segment": "SegmentationModel", "Pose": "PoseModel", "OBB": "OBBModel",
    "RTDETRDecoder": "RTDETRDetectionModel", "WorldDetect": "WorldModel",
}  # fmt: skip


def make_ultralytics(name: str, options: dict[str, Any]) -> nn.Module:
    """Return the model of the YAML called ``name``, with random weights; ``options`` are ``nc`` and ``ch``.

    Raises:
        UnsafeFileError: a file of the user's own holds what the library would evaluate or call.
        InputError: there is no such YAML.
    """
    tasks: Any = import_library("ultralytics.nn.tasks", "--arch ultralytics:…")
    path = Path(name)
    if os.path.isfile(path):
        settings = _checked(path, tasks)
        settings["scale"] = tasks.guess_model_scale(path) or settings.get("scale", "")
        settings["yaml_file"] = path.name
    else:
        settings = _of_package(name, tasks)
    found = _CLASSES.get(str(settings["head"][-1][2]), "DetectionModel")
    # The library sets a YAML's activation for all models, and back only where it succeeds.
    activation = tasks.Conv.default_act
    try:
        model: nn.Module = getattr(tasks, found)(settings, verbose=False, **options)
    finally:
        tasks.Conv.default_act = activation
    return model


def _of_package(name: str, tasks: Any) -> dict[str, Any]:
    """Return the settings in a YAML of the package; the letter of a size is no part of its name."""
    folder = Path(tasks.__file__).parents[1] / "cfg" / "models"
    if not _FILE_NAME.fullmatch(name):
        raise InputError(f"--arch ultralytics:{quoted(name)}", needed="a file, or the name of a YAML in the package")
    known = {path.name: path for path in folder.rglob("*.yaml")}
    unified = re.sub(r"(\d+)([nslmx])(.+)?$", r"\1\3", name)
    path = known.get(name) or known.get(unified)
    if path is None:
        raise InputError(f"ultralytics has no model {quoted(name)}; it has {listed(sorted(known))}")
    settings: dict[str, Any] = _parsed(path)
    return {**settings, "scale": tasks.guess_model_scale(name), "yaml_file": name}


def _checked(path: Path, tasks: Any) -> dict[str, Any]:
    settings = _parsed(path)
    layers = [layer for part in ("backbone", "head") for layer in settings.get(part) or ()]
    if not layers or not all(isinstance(layer, list) and len(layer) == 4 for layer in layers):
        raise InputError(f"{quoted(path)} is no model", needed="a backbone and a head of [from, repeats, module, args]")
    for layer in layers:
        _require_module(layer[2], tasks)
    activation = settings.get("activation")
    if activation is not None and not (isinstance(activation, str) and _ACTIVATION.fullmatch(activation)):
        raise UnsafeFileError(f"{quoted(path)} has the activation {quoted(activation)}", needed="one such as nn.SiLU()")
    _require_plain({key: value for key, value in settings.items() if key != "activation"})
    return settings


def _parsed(path: Path) -> dict[str, Any]:
    yaml: Any = import_library("yaml", "a YAML")
    with path.open("rb") as handle:
        text = handle.read(MOST_YAML_BYTES + 1)
    if len(text) > MOST_YAML_BYTES:
        raise InputError(f"{quoted(path)} has more than {MOST_YAML_BYTES} bytes")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(f"{quoted(path)} is not YAML") from None
    if not isinstance(found, dict):
        raise InputError(f"{quoted(path)} is not a YAML of a model")
    return found


def _require_module(name: object, tasks: Any) -> None:
    if not isinstance(name, str) or not _PLAIN_TEXT.fullmatch(name) or name in _FETCHING:
        raise UnsafeFileError(f"it names the module {quoted(name)}", needed="a module of ultralytics or torch.nn")
    found = getattr(nn, name[3:], None) if name.startswith("nn.") else getattr(tasks, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UnsafeFileError(f"it names {quoted(name)}", needed="a module of ultralytics or torch.nn")


def _require_plain(settings: dict[str, Any]) -> None:
    # An alias may put one value in many places; each is looked at once.
    seen: set[int] = set()
    open_ends: list[object] = [settings]
    while open_ends:
        value = open_ends.pop()
        if isinstance(value, (dict, list)) and id(value) not in seen:
            seen.add(id(value))
            open_ends += [*value, *(value.values() if isinstance(value, dict) else ())]
        elif isinstance(value, str) and not _PLAIN_TEXT.fullmatch(value):
            raise UnsafeFileError(f"the YAML holds the text {quoted(value)}", needed="plain names and numbers")
