"""Folders as model hubs lay them out: config.json beside weights in one file or in shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import repconv_cli
from repconv_cli.checkpoint import read
from repconv_cli.errors import DamagedFileError, InputError, OutputError, UnsafeFileError
from tests.checkpoint.hostile_files import Calls

WEIGHTS = {"a.weight": torch.rand(4, 3), "b.weight": torch.rand(2).half(), "c": torch.arange(3)}


def sharded(folder: Path, weights: dict[str, Tensor], ending: str, shards: int = 2, **changes: str | None) -> Path:
    """Write ``weights`` as shards with an index; ``changes`` put a tensor elsewhere in the index, or nowhere."""
    folder.mkdir(exist_ok=True)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
    places: dict[str, str | None] = {}
    for n in range(shards):
        part = {key: value for i, (key, value) in enumerate(weights.items()) if i % shards == n}
        name = f"{stem}-{n + 1:05}-of-{shards:05}.{ending}"
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    places |= changes
    index = {"metadata": {"total_size": 1}, "weight_map": {k: v for k, v in places.items() if v is not None}}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.{ending}.index.json"


def in_order(tensors: dict[str, Tensor] | None, like: dict[str, Tensor]) -> dict[str, Tensor]:
    assert tensors is not None
    assert set(tensors) == set(like)
    return {key: tensors[key] for key in like}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("as_index", [True, False], ids=["index", "folder"])
def test_shards_together_hold_the_tensors_of_one_file(tmp_path: Path, ending: str, as_index: bool) -> None:
    index = sharded(tmp_path / "m", WEIGHTS, ending)
    source = read(index if as_index else tmp_path / "m")
    found = in_order(source.tensors, WEIGHTS)
    assert all(torch.equal(found[key], WEIGHTS[key]) and found[key].dtype == WEIGHTS[key].dtype for key in WEIGHTS)
    assert "3 tensors in 2 shards" in source.notes
    assert source.size_bytes == sum(f.stat().st_size for f in (tmp_path / "m").glob(f"*-of-*.{ending}"))
    assert source.sha256 == read(index).sha256
    assert len(source.sha256) == 64


FALSE_INDEXES = [
    ("missing tensor", {"d": "model-00001-of-00002.safetensors"}, DamagedFileError, "are not in the shard .*: d"),
    ("wrong shard", {"c": "model-00002-of-00002.safetensors"}, DamagedFileError, "that the index names: c"),
    ("extra tensor", {"c": None}, DamagedFileError, "in a shard and not in the index: c"),
    ("missing shard", {"d": "model-00003.safetensors"}, InputError, "1 of 3 shards are missing: model-00003"),
    ("another folder", {"d": "../w.safetensors"}, UnsafeFileError, r"names the shard \.\./w"),
    ("absolute", {"d": "/etc/passwd"}, UnsafeFileError, "names the shard /etc/passwd"),
    ("control characters", {"d": "a\x1b[31m"}, UnsafeFileError, r"a\\x1b\[31m"),
    ("dots", {"d": ".."}, UnsafeFileError, r"names the shard \.\."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "reason"), [f[1:] for f in FALSE_INDEXES], ids=[f[0] for f in FALSE_INDEXES]
)
def test_an_index_that_lies_is_refused(tmp_path: Path, refused, changes, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    sharded(tmp_path / "m", WEIGHTS, "safetensors", **changes)
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    refused(tmp_path / "m", kind, reason)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    sharded(tmp_path / "m", WEIGHTS, "safetensors")
    save_file({"b.weight": WEIGHTS["b.weight"], "c": WEIGHTS["c"]}, tmp_path / "m" / "model-00002-of-00002.safetensors")
    refused(tmp_path / "m", DamagedFileError, "1 tensors are in more than one shard: c")


NO_INDEX = [
    ('{"weight_map": 3}', "has no weight_map"),
    ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": ', "is not JSON"),
    ('{"weight_map": ' + "[" * 100_000, "is not JSON"),
]


@pytest.mark.parametrize(("text", "reason"), NO_INDEX)
def test_an_index_that_is_none_is_refused(tmp_path: Path, refused, text: str, reason: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "w.index.json").write_text(text)
    refused(tmp_path / "w.index.json", DamagedFileError, reason)


def test_a_shard_that_would_run_code_is_refused(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    sharded(tmp_path / "m", WEIGHTS, "bin")
    torch.save({"b.weight": Calls(os.mkdir, "marker")}, tmp_path / "m" / "pytorch_model-00002-of-00002.bin")
    refused(tmp_path / "m", UnsafeFileError, "00002-of-00002.bin: the pickle asks for .*mkdir")
    assert not Path("marker").exists()


def test_a_shard_that_is_a_pipe_is_not_opened(tmp_path: Path, refused) -> None:  # type: ignore[no-untyped-def]
    sharded(tmp_path / "m", WEIGHTS, "bin")
    shard = tmp_path / "m" / "pytorch_model-00002-of-00002.bin"
    shard.unlink()
    os.mkfifo(shard)
    refused(tmp_path / "m", InputError, "this is a named pipe")


FOLDERS = [
    ("empty", [], "this is a folder with no weights in it; needed: one of model.safetensors"),
    ("two", ["a.safetensors", "b.safetensors"], "a folder with a.safetensors, b.safetensors in it"),
]


@pytest.mark.parametrize(("names", "reason"), [f[1:] for f in FOLDERS], ids=[f[0] for f in FOLDERS])
def test_a_folder_without_clear_weights_lists_them(tmp_path: Path, refused, names: list[str], reason: str) -> None:  # type: ignore[no-untyped-def]
    for name in names:
        save_file(WEIGHTS, tmp_path / name)
    refused(tmp_path, InputError, reason)


def test_safetensors_go_before_a_pickle_and_it_is_said(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    source = read(tmp_path)
    assert set(source.tensors or ()) == set(WEIGHTS)
    assert "read model.safetensors, not pytorch_model.bin" in source.notes


def test_the_output_is_never_a_file_of_the_folder(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(OutputError, match="the output is the input"):
        repconv_cli.fuse(tmp_path, tmp_path / "model.safetensors", force=True)
