"""A transformers model made from a checked ``config.json``: the installed library's own class, and nothing fetched."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from repconv_cli.checkpoint.hub_config import ModelConfig
from repconv_cli.checkpoint.importing import import_library, library_code
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError


def make_transformers(config: ModelConfig) -> nn.Module:
    """Return the model with random weights.

    Raises:
        InputError: the installed transformers has no such class, or it belongs to another type of model.
    """
    library = import_library("transformers", "this config.json")
    with library_code():
        kinds = library.CONFIG_MAPPING
        model_type = str(config.values.get("model_type"))
        if model_type not in kinds:
            raise InputError(
                f"the installed transformers {library.__version__} knows no model type {quoted(model_type)}",
                hint="Install the version that saved it, or give --arch file.py:callable.",
            )
        made_from = kinds[model_type]
        found: Any = getattr(library, config.name, None)
        is_model = isinstance(found, type) and issubclass(found, library.PreTrainedModel)
        if not is_model or not str(found.__module__).startswith("transformers."):
            raise InputError(
                f"the installed transformers {library.__version__} has no model class {quoted(config.name)}",
                hint="Install the version that saved it, or give --arch file.py:callable.",
            )
        if found.config_class is not made_from:
            raise InputError(f"a {quoted(config.name)} is no model of the type {quoted(model_type)}")
        module: nn.Module = found(made_from(**config.values))
        return module


def input_name(module: nn.Module) -> str | None:
    """Return the keyword that a transformers model takes its images by, ``pixel_values`` mostly."""
    name = getattr(module, "main_input_name", None)
    return name if isinstance(name, str) else None


def load_renamed(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the weights by the names that ``module`` has now, as transformers' own rules rename older ones.

    None where those rules leave anything missing, of another shape, or left over.
    """
    if not hasattr(module, "from_pretrained") or not hasattr(module, "config"):
        return None
    kind: Any = type(module)
    with library_code():
        loaded, told = kind.from_pretrained(
            None, config=module.config, state_dict=dict(tensors), output_loading_info=True
        )
    trouble = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in told.get(kind, ())]
    if trouble or told.get("error_msgs"):
        return None
    return dict(loaded.state_dict())
