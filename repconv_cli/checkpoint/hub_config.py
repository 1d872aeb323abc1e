"""``config.json`` of a model hub: which library's model the weights beside it are, as checked plain values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from repconv_cli.checkpoint.formats import open_regular
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.checkpoint.reading import require_few_parts
from repconv_cli.errors import DamagedFileError, InputError, RepconvError, UnsafeFileError

MOST_JSON_BYTES = 16 << 20

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_COUNTED = re.compile("num_|layer|depth|block|repeat|class|label|stage")
_MOST_PARTS = 200_000
_LARGEST = 1 << 40
_WORD = re.compile(r"[A-Za-z0-9_.+ -]{0,200}")

# What decides where code, weights or kernels come from; the weights beside the file and the installed library do here.
_DROPPED = frozenset(
    (
        *("attn_implementation", "experts_implementation", "use_pretrained_backbone", "use_kernels", "name_or_path"),
        *("dtype", "torch_dtype", "transformers_version", "return_dict", "output_attentions", "output_hidden_states"),
    )
)
# Names of models that a library looks up; written as a path or an address they would be fetched.
_LOOKED_UP = frozenset(["backbone", "architecture"])


@dataclass(frozen=True)
class ModelConfig:
    """A model as its hub describes it: the ``library`` that has it, its name there, and plain values to make it with.

    ``name`` is timm's name of the architecture, or the transformers class. ``input_size`` is channels, height, width.
    """

    library: Literal["timm", "transformers"]
    name: str
    values: dict[str, Any]
    input_size: tuple[int, ...] | None = None


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in the file at ``path``, of at most ``most`` bytes.

    Raises:
        InputError: it cannot be read, is larger, or has more parts than any model needs.
        DamagedFileError: it is not one JSON object.
    """
    try:
        with open_regular(path) as handle:
            text = handle.read(most + 1)
        if len(text) > most:
            raise InputError(f"it has more than {most} bytes")
        require_few_parts(text, "it")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise DamagedFileError("it is not JSON", hint="Download it again.") from None
        if not isinstance(found, dict):
            raise DamagedFileError("it is not a JSON object", hint="Download it again.")
    except RepconvError as error:
        raise error.at(quoted(path, limit=200)) from None
    return found


def read_config(path: Path) -> ModelConfig:
    """Return the model that the ``config.json`` at ``path`` describes.

    Raises:
        UnsafeFileError: it asks for code from the hub (``auto_map``), or for a model by a path or an address.
        InputError: it describes no model of timm or transformers, or quantized weights.
    """
    found = read_json(path)
    try:
        is_timm = isinstance(found.get("architecture"), str) and found.get("model_type") in (None, "timm_wrapper")
        return _timm(found) if is_timm else _transformers(found)
    except RepconvError as error:
        raise error.at(quoted(path, limit=200)) from None


def _timm(found: dict[str, Any]) -> ModelConfig:
    pretrained = found.get("pretrained_cfg")
    pretrained = pretrained if isinstance(pretrained, dict) else found
    arguments = found.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise DamagedFileError("its model_args are not an object")
    size = _input_size(pretrained.get("input_size"))
    values: dict[str, Any] = {}
    if size is not None:
        values["in_chans"] = size[0]
        if pretrained.get("fixed_input_size") is True:
            values["img_size"] = list(size[1:])
    for key in ("num_classes", "global_pool"):
        value = found.get(key, pretrained.get(key))
        if value is not None and not (isinstance(value, int) and value < 0):
            values[key] = value
    values |= arguments
    _require_plain(values)
    return ModelConfig("timm", _model_name(found["architecture"]), values, size)


def _transformers(found: dict[str, Any]) -> ModelConfig:
    if found.get("auto_map") or found.get("custom_pipelines"):
        raise UnsafeFileError(
            "it asks for code from the hub (auto_map), which is never run",
            hint="Give a class that you trust with --arch file.py:callable.",
        )
    if found.get("quantization_config"):
        raise InputError("its weights are quantized", needed="ordinary weights")
    model_type, classes = found.get("model_type"), found.get("architectures")
    if not isinstance(model_type, str) or not isinstance(classes, list) or not classes:
        raise InputError(
            f"it names no model; its entries are {listed(found) or 'none'}",
            needed="architecture (timm), or model_type and architectures (transformers)",
            hint="Give the architecture with --arch.",
        )
    values = _without_sources(found, 0)
    _require_plain(values)
    return ModelConfig("transformers", _model_name(classes[0]), values, _image_size(found))


def _without_sources(values: dict[str, Any], depth: int) -> dict[str, Any]:
    if depth > 20:
        raise DamagedFileError("it is nested too deeply")
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_") or key in _DROPPED:
            continue
        kept[key] = _without_sources(value, depth + 1) if isinstance(value, dict) else value
        if key in _LOOKED_UP and value is not None:
            _model_name(value)
    return kept


def _model_name(value: object) -> str:
    if not isinstance(value, str) or not _MODEL_NAME.fullmatch(value):
        raise UnsafeFileError(f"it names the model {quoted(value)}", needed="a plain name, no path and no address")
    return value


def _require_plain(values: dict[str, Any]) -> None:
    """Refuse what is no identifier as a key at the top: these become arguments of a function."""
    for key, value in values.items():
        if not key.isidentifier() or key.startswith("_"):
            raise UnsafeFileError(f"it has an entry called {quoted(key)}", needed="plain names")
        if key in ("pretrained", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"):
            raise UnsafeFileError(
                f"it sets {key}, which decides where weights come from", needed="an architecture alone"
            )
        _require_count(key, value)
        if isinstance(value, str) and key.endswith(("_layer", "_pool")) and not _WORD.fullmatch(value):
            raise UnsafeFileError(f"its {key} is {quoted(value)}", needed="a plain name")


def _require_count(key: str, value: object) -> None:
    """Refuse a number of parts that no model has: libraries make lists of that length before any module."""
    open_ends: list[tuple[str, object]] = [(key, value)]
    while open_ends:
        name, item = open_ends.pop()
        if isinstance(item, dict):
            open_ends += [(str(inner), part) for inner, part in item.items()]
        elif isinstance(item, list):
            open_ends += [(name, part) for part in item]
        elif isinstance(item, int) and item > (_MOST_PARTS if _COUNTED.search(name) else _LARGEST):
            raise DamagedFileError(f"its {quoted(name)} is {quoted(item)}", needed="the size of a model")


def _input_size(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and len(value) == 3 and all(_is_size(item) for item in value):
        return tuple(value)
    return None


def _image_size(found: dict[str, Any]) -> tuple[int, ...] | None:
    """Return channels, height and width, if the model's own settings or those of its backbone tell them."""
    nested = [found.get(key) for key in ("vision_config", "backbone_config")]
    for values in (found, *(item for item in nested if isinstance(item, dict))):
        size, channels = values.get("image_size"), values.get("num_channels", 3)
        if isinstance(size, dict):
            size = [size.get("height"), size.get("width")]
        sides = [size, size] if _is_size(size) else size
        if isinstance(sides, list) and len(sides) == 2 and all(_is_size(side) for side in (*sides, channels)):
            return (channels, *sides)
    return None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16
