"""Weights put into the module that they belong to: every tensor of both has its place, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from repconv_cli.checkpoint.architectures import near
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.checkpoint.transformers_models import load_renamed
from repconv_cli.errors import InputError

_COUNTER = "num_batches_tracked"


def load_weights(module: nn.Module, tensors: dict[str, Tensor], prefixes: Sequence[str] = ()) -> tuple[str, ...]:
    """Load ``tensors`` into ``module`` strictly, the module taking the dtype that the weights have.

    ``prefixes`` are what was taken off all names: they come back where the module's own names have them. Returns the
    sentences to tell of what was not one to one.

    Raises:
        InputError: naming what is missing, unexpected, or of another shape or kind of number.
    """
    notes: list[str] = []
    own = module.state_dict()
    tensors = _with_names_of(own, tensors, prefixes, notes)
    missing, unexpected = _trouble(module, own, tensors)
    if missing or unexpected:
        renamed = load_renamed(module, tensors)
        if renamed is not None:
            notes.append("older names were changed by the rules of transformers")
            tensors, missing, unexpected = renamed, [], []
    if missing and (inside := _inside(own, tensors)) is not None:
        prefix, tensors = inside
        others = [key for key in unexpected if not key.startswith(prefix)]
        left_out = f"; {len(others)} others were left out ({_some(others)})" if others else ""
        notes.append(f"the weights are those under {prefix!r}{left_out}")
        missing, unexpected = _trouble(module, own, tensors)
    if missing or unexpected:
        raise InputError("the weights do not belong to this architecture: " + _key_trouble(missing, unexpected))
    wrong = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if wrong:
        raise _wrong_shape(module, own, tensors, wrong)
    _require_floats(own, tensors)
    module.to(dtype=_weight_dtype(tensors))
    notes += _load_unsaved(module, own, tensors)
    module.load_state_dict({key: tensors[key] for key in own if key in tensors}, strict=False)
    return tuple(notes)


def _require_floats(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    # torch would convert them, and drop what the other type cannot hold.
    for key in own:
        if key in tensors and own[key].is_floating_point() and not tensors[key].is_floating_point():
            found = f"tensor {quoted(key)} holds {str(tensors[key].dtype).removeprefix('torch.')} numbers"
            raise InputError(found, needed="floating-point numbers for this architecture")


def _with_names_of(
    own: dict[str, Tensor], tensors: dict[str, Tensor], prefixes: Sequence[str], notes: list[str]
) -> dict[str, Tensor]:
    """Return the tensors with as many of the prefixes put back as the module's own names have."""
    best = tensors
    for start in range(len(prefixes) - 1, -1, -1):
        prefix = "".join(prefixes[start:])
        again = {prefix + key: value for key, value in tensors.items()}
        if len(own.keys() & again.keys()) > len(own.keys() & best.keys()):
            best = again
            notes[:] = [f"the architecture's own names begin with {prefix!r}, which therefore stayed"]
    return best


def _inside(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """Return the one prefix under which all of the module's own names are, and what is there by these names.

    None where there is none, or another one as well: which of two models is meant, only the user can say.
    """
    needed = {key for key in own if not key.endswith(_COUNTER)}
    if not needed:
        return None
    first = min(needed)
    prefixes = {key.removesuffix(first) for key in tensors if key.endswith(f".{first}")}
    found = [prefix for prefix in prefixes if all(prefix + key in tensors for key in needed)]
    if len(found) != 1:
        return None
    inside = {key.removeprefix(found[0]): value for key, value in tensors.items() if key.startswith(found[0])}
    return found[0], inside


def _trouble(module: nn.Module, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names that are missing, but for those tied to one that is there, and those that have no place."""
    places = {name: id(value) for name, value in _all_tensors(module)}
    filled = {places[key] for key in tensors if key in places}
    missing = [key for key in own if key not in tensors and places.get(key) not in filled]
    # Files of old versions of torch, and some converters, have none; nothing reads them but training.
    missing = [] if all(key.endswith(_COUNTER) for key in missing) else missing
    unexpected = [key for key in tensors if key not in own and key not in places]
    return missing, unexpected


def _all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _load_unsaved(module: nn.Module, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Copy what the file holds of buffers that the module does not save: other versions of it did."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    unsaved = [key for key in tensors if key not in own]
    with torch.no_grad():
        for key in unsaved:
            if buffers[key].shape != tensors[key].shape:
                found = f"buffer {quoted(key)} has shape {tuple(tensors[key].shape)}"
                raise InputError(found, needed=f"{tuple(buffers[key].shape)} for this architecture")
            buffers[key].copy_(tensors[key])
    return [f"{len(unsaved)} buffers that the architecture does not save were taken over"] if unsaved else []


def _wrong_shape(module: nn.Module, own: dict[str, Tensor], tensors: dict[str, Tensor], wrong: list[str]) -> InputError:
    key, hint = wrong[0], None
    found = f"tensor {quoted(key)} has shape {tuple(tensors[key].shape)}"
    found += f" (and {len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    classes = {tensors[k].shape[0] for k in wrong if tensors[k].ndim and tensors[k].shape[1:] == own[k].shape[1:]}
    if len(wrong) <= 4 and len(classes) == 1 and type(module).__module__.startswith(("timm.", "torchvision.")):
        hint = f"If this is the number of classes, append it to --arch: …,num_classes={classes.pop()}"
    return InputError(found, needed=f"{tuple(own[key].shape)} for this architecture", hint=hint)


def _weight_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _key_trouble(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)}{near(missing[0], unexpected)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    return ", ".join(parts)


def _some(keys: list[str]) -> str:
    return ", ".join(quoted(key) for key in keys[:3]) + (", …" if len(keys) > 3 else "")
