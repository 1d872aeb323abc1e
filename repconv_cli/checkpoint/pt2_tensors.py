"""The tensors of an exported program: raw bytes in the archive, described by a JSON table."""

from __future__ import annotations

import math

import torch

from repconv_cli.checkpoint import pt2_schema as schema
from repconv_cli.checkpoint.admitted import ITEM_BYTES
from repconv_cli.checkpoint.archive import Archive
from repconv_cli.checkpoint.pt2_arguments import MOST_JSON_BYTES, decoded, shape, size
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.errors import DamagedFileError, UnsafeFileError

_AGAIN = "Export and save it again with torch 2.9 or newer."


class Payload(schema.Record, frozen=True):
    """Where a tensor's bytes are."""

    path_name: str
    is_param: bool
    use_pickle: bool
    tensor_meta: schema.TensorMeta | None


class PayloadConfig(schema.Record, frozen=True):
    """The places of all tensors, by name."""

    config: dict[str, Payload]


def read_tensors(archive: Archive, folder: str) -> dict[str, torch.Tensor]:
    """Return the parameters, buffers and constants in a checked archive, by name.

    Raises:
        UnsafeFileError: one is a pickle or an opaque object.
        DamagedFileError: one claims elements that its member does not hold.
        InputError: one is not dense, or has a dtype that is not read here.
    """
    tensors: dict[str, torch.Tensor] = {}
    for kind in ("weights", "constants"):
        name = f"{folder}data/{kind}/model_{kind}_config.json"
        config: PayloadConfig = decoded(archive.read(name, MOST_JSON_BYTES), PayloadConfig, f"its {kind}")
        pickled = [key for key, payload in config.config.items() if payload.use_pickle or payload.tensor_meta is None]
        if pickled:
            raise UnsafeFileError(f"its {kind} hold pickled or opaque objects: {listed(pickled)}", hint=_AGAIN)
        storages: dict[str, torch.UntypedStorage] = {}
        for key, payload in config.config.items():
            if key in tensors:
                raise DamagedFileError(f"tensor {quoted(key)} is described twice")
            tensors[key] = _tensor(archive, f"{folder}data/{kind}/", key, payload, storages)
    return tensors


def _tensor(
    archive: Archive, folder: str, key: str, payload: Payload, storages: dict[str, torch.UntypedStorage]
) -> torch.Tensor:
    meta = payload.tensor_meta
    assert meta is not None
    where = shape(key, meta)
    sizes, strides, offset = _fixed(key, meta.sizes), _fixed(key, meta.strides), _fixed(key, [meta.storage_offset])[0]
    if len(sizes) != len(strides):
        raise DamagedFileError(f"tensor {quoted(key)} has {len(sizes)} sizes and {len(strides)} strides")
    if "/" in payload.path_name:
        raise UnsafeFileError(f"tensor {quoted(key)} is kept outside of its folder: {quoted(payload.path_name)}")
    member = folder + payload.path_name
    held = archive.size(member) // ITEM_BYTES[where.dtype]
    count = math.prod(sizes)
    reach = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if count and (reach > held or count > max(held, 1 << 16)):
        raise DamagedFileError(f"tensor {quoted(key)} claims {max(reach, count)} elements", needed=f"at most {held}")
    if member not in storages:
        storages[member] = _storage(archive, member)
    empty = torch.empty(0, dtype=getattr(torch, where.dtype))
    return empty.set_(storages[member], offset, sizes, strides)


def _storage(archive: Archive, member: str) -> torch.UntypedStorage:
    raw = torch.empty(archive.size(member), dtype=torch.uint8)
    if raw.numel():
        archive.read_into(member, raw.numpy().data)
    return raw.untyped_storage()


def _fixed(key: str, values: list[schema.SymInt]) -> tuple[int, ...]:
    sizes = [size(value) for value in values]
    fixed = tuple(value for value in sizes if isinstance(value, int) and 0 <= value < 1 << 62)
    if len(fixed) != len(sizes):
        raise DamagedFileError(f"tensor {quoted(key)} has a size that is free or negative")
    return fixed
