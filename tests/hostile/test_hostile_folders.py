"""Folders as model hubs lay them out, from someone who lies: refused in one clean line, nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from repconv_cli.checkpoint import read
from tests.checkpoint.hostile_files import Calls, checkpoint
from tests.checkpoint.test_hub_folders import sharded
from tests.hostile.case import MARKER
from tests.hostile.judge import judge

WEIGHTS = {f"layer{n}.weight": torch.rand(4, 3) for n in range(4)}
TIMM = {"architecture": "repvgg_a0", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}


def config(folder: Path, **changes: Any) -> None:
    """Write weights, and a ``config.json`` of timm with these changes."""
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TIMM | changes))


def text(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(WEIGHTS, folder / "model.safetensors")
        (folder / "config.json").write_text(content)

    return write


def shard(ending: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Write shards, and change the second of them."""

    def write(folder: Path) -> None:
        sharded(folder, WEIGHTS, ending)
        change(next(folder.glob(f"*00002-of-00002.{ending}")))

    return write


def index(places: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        sharded(folder, WEIGHTS, "safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return write


def link_to(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def call(path: Path) -> None:
    torch.save({"layer1.weight": Calls(os.mkdir, MARKER)}, path)


def bare_call(path: Path) -> None:
    path.write_bytes(pickle.dumps(Calls(os.mkdir, MARKER)))


def call_in_archive(path: Path) -> None:
    checkpoint(path, pickle.dumps({"layer1.weight": Calls(os.mkdir, MARKER)}, 2))


CASES: list[tuple[str, Callable[[Path], object], str]] = [
    ("shard with a call", shard("bin", call), r"00002-of-00002\.bin: the pickle asks for .*mkdir"),
    ("shard that is a pickle", shard("bin", bare_call), "00002-of-00002"),
    ("shard with a call in an archive", shard("bin", call_in_archive), "00002-of-00002.*mkdir"),
    ("safetensors shard that is a pickle", shard("safetensors", bare_call), "00002-of-00002"),
    ("shard cut short", shard("bin", lambda path: os.truncate(path, 700)), "00002-of-00002"),
    ("empty shard", shard("safetensors", lambda path: os.truncate(path, 0)), "00002-of-00002"),
    ("shard of 1 TB", shard("safetensors", lambda path: os.truncate(path, 1 << 40)), "00002-of-00002"),
    ("shard missing", shard("bin", lambda path: path.unlink()), "1 of 2 shards are missing"),
    ("shard links to nothing", shard("bin", link_to("nowhere")), "1 of 2 shards are missing"),
    ("shard links to itself", shard("bin", link_to("pytorch_model-00002-of-00002.bin")), "shards are missing"),
    ("shard links to a device", shard("bin", link_to("/dev/zero")), "00002-of-00002.*device"),
    ("shard links to a folder", shard("bin", link_to("..")), "00002-of-00002.*folder"),
    ("shard links to a text", shard("bin", link_to("/proc/self/environ")), "00002-of-00002"),
    ("index of another folder", index({"layer0.weight": "../w.safetensors"}), r"names the shard \.\./w"),
    ("index of a file by its path", index({"layer0.weight": "/etc/passwd"}), "names the shard /etc/passwd"),
    ("index of itself", index({"layer0.weight": "model.safetensors.index.json"}), "inside of another one"),
    ("index of many shards", index({str(n): f"{n}.bin" for n in range(20_000)}), "lists 20000 shards"),
    ("index of a list", index([["layer0.weight", "model.safetensors"]]), "has no weight_map"),
    ("config of another model", config, "do not belong to this architecture"),
    ("config of a huge model", lambda f: config(f, model_args={"depths": [1 << 30]}), "config.json|model"),
    ("config of many classes", lambda f: config(f, num_classes=1 << 36), "config.json|num_classes"),
    ("config of a huge image", lambda f: config(f, pretrained_cfg={"input_size": [3, 1 << 30, 1 << 30]}), ""),
    ("config of a path", lambda f: config(f, architecture="../../evil"), "config.json"),
    ("config of an address", lambda f: config(f, architecture="hf-hub:evil/model"), "config.json"),
    ("config of a file to load", lambda f: config(f, model_args={"checkpoint_path": "w.pt"}), "config.json|checkpoint"),
    ("config of code", lambda f: text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))(f), "never run"),
    ("config of no model", text("{}"), "config.json"),
    ("config that is a list", text("[]"), "it is not a JSON object"),
    ("config that is deep", text('{"a": ' * 100_000), "it is not JSON"),
    ("config that is deep and whole", text('{"architecture": ' + "[" * 900 + "]" * 900 + "}"), "config.json"),
    ("config that is large", text('{"a": "' + "x" * (17 << 20) + '"}'), "has more than"),
    ("config of many parts", text('{"a": [' + "{}," * 2_000_000 + "{}]}"), "config.json.*parts"),
    ("config of a long number", text('{"num_classes": ' + "9" * 100_000 + "}"), "config.json"),
    ("config with control characters", lambda f: config(f, architecture="\x1b[31mrepvgg"), "config.json"),
]


@pytest.mark.parametrize(("write", "reason"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_hostile_folder_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], object], reason: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    write(tmp_path / "in" / "model")
    found = judge(tmp_path / "in" / "model", tmp_path / "out" / "model.safetensors")
    assert found.wrong == [], found.output[-2000:]
    assert found.is_refused, found.output[-2000:]
    assert re.search(reason, found.message), found.message
    assert not (tmp_path / "in" / MARKER).exists()


def test_weights_that_are_links_into_a_cache_are_read(tmp_path: Path) -> None:
    """Hubs' caches are made of such links: what they lead to is checked as any file is."""
    (tmp_path / "blobs").mkdir()
    sharded(tmp_path / "model", WEIGHTS, "safetensors")
    for path in (tmp_path / "model").glob("*-of-*"):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert set(read(tmp_path / "model").tensors or ()) == set(WEIGHTS)
