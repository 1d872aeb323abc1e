"""A folder as model hubs lay it out: ``config.json`` beside the weights, in one file or in shards with an index."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from repconv_cli.checkpoint.hub_config import read_json
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError

CONFIG = "config.json"
INDEX_ENDING = ".index.json"

# In order of preference: what holds no code goes first.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_MOST_SHARDS = 10_000


@dataclass(frozen=True)
class Layout:
    """What lies in a folder: the weights' files, which tensor is in which (for shards), and ``config.json`` if any."""

    files: tuple[Path, ...]
    places: Mapping[str, str] | None
    config: Path | None
    notes: tuple[str, ...]


def layout_of(folder: Path) -> Layout:
    """Return what lies in ``folder``.

    Raises:
        InputError: there are no weights in it, or several files that could be them.
        UnsafeFileError: an index names files that lie elsewhere.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, 100_000))
    except OSError as error:
        raise InputError(f"the folder cannot be read ({error.strerror})") from None
    chosen = next((name for name in _WEIGHTS if name in names), None)
    if chosen is None:
        others = [name for name in names if name.endswith(_ENDINGS)]
        if len(others) != 1:
            raise InputError(
                f"this is a folder with {listed(others) if others else 'no weights'} in it",
                needed=f"one of {', '.join(_WEIGHTS)}",
                hint="Give the file itself." if others else None,
            )
        chosen = others[0]
    left = [name for name in _WEIGHTS if name in names and name != chosen]
    notes = [f"read {chosen}" + (f", not {listed(left)}" if left else "")]
    config = folder / CONFIG if CONFIG in names else None
    if chosen.endswith(INDEX_ENDING):
        return layout_of_index(folder / chosen, config, notes)
    return Layout((folder / chosen,), None, config, tuple(notes))


def layout_of_index(index: Path, config: Path | None = None, notes: list[str] | None = None) -> Layout:
    """Return the shards that the file ``index`` lists.

    Raises:
        DamagedFileError: it does not say which tensor is in which shard.
        UnsafeFileError: a shard is not a plain file name, so that it could lie in another folder.
    """
    places: Any = read_json(index).get("weight_map")
    where = quoted(index, limit=200)
    is_map = isinstance(places, dict) and places and all(isinstance(shard, str) for shard in places.values())
    if not is_map:
        raise DamagedFileError("it has no weight_map of tensors to shards", where=where, hint="Download it again.")
    shards = sorted(set(places.values()))
    if len(shards) > _MOST_SHARDS:
        raise InputError(f"it lists {len(shards)} shards", where=where, needed=f"at most {_MOST_SHARDS}")
    outside = [shard for shard in shards if not _is_file_name(shard)]
    if outside:
        raise UnsafeFileError(
            f"it names the shard {quoted(outside[0])}", where=where, needed="a file in the same folder"
        )
    missing = [shard for shard in shards if not os.path.exists(index.parent / shard)]
    if missing:
        raise InputError(f"{len(missing)} of {len(shards)} shards are missing: {listed(missing)}", where=where)
    told = [*(notes or []), f"{len(places)} tensors in {len(shards)} shards"]
    return Layout(tuple(index.parent / shard for shard in shards), places, config, tuple(told))


def check_shards(layout: Layout, held: Mapping[str, list[str]]) -> None:
    """Check that each shard holds exactly the tensors that the index puts there; ``held`` lists what they hold.

    Raises:
        DamagedFileError: a tensor is missing, is in two shards, or is in none of the index's places.
    """
    if layout.places is None:
        return
    counts = Counter(name for names in held.values() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    missing = [name for name, shard in layout.places.items() if name not in held.get(shard, ())]
    extra = [name for name in counts if name not in layout.places]
    for names, what in (
        (twice, "tensors are in more than one shard"),
        (missing, "tensors are not in the shard that the index names"),
        (extra, "tensors are in a shard and not in the index"),
    ):
        if names:
            raise DamagedFileError(f"{len(names)} {what}: {listed(names, most=3)}", hint="Download the folder again.")


def _is_file_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:") and name.isprintable()
