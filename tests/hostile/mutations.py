"""Random damage to a file, the same for the same seed: to its bytes, or to what lies inside, with checksums made right.

Damage to the bytes of an archive is mostly found by a checksum. Damage inside reaches the pickle and the JSON.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import zipfile
from collections.abc import Callable
from typing import Any

Damage = Callable[[random.Random, bytes], bytes]
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 255, 1 << 31, 1 << 40, 1 << 63, -(1 << 70), 0.5, 1e308, "", "x", "\x1b[31m", "s0 // 0",
    "NaN", "torch.ops.aten.relu.default", "aten.zeros.default", [], [[]], [1] * 30, {},
    {"as_int": 1 << 40}, {"node": 0},
)  # fmt: skip


def mutated(name: str, content: bytes, seed: int) -> tuple[str, bytes]:
    """Return (the kind of damage, ``content`` with it)."""
    draw = random.Random(f"{name} {seed}")
    if draw.random() < 0.5:
        kind = draw.choice(list(_ON_BYTES))
        return kind, _ON_BYTES[kind](draw, content)
    if content.startswith(b"PK"):
        return _inside_archive(draw, content)
    if content[8:9] == b"{":
        return _inside_header(draw, content)
    return "opcodes", _opcodes(draw, content)


def members(content: bytes) -> dict[str, bytes]:
    """Return what an archive holds by name, as Python's own reader sees it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _range(draw: random.Random, content: bytes, most: int = 512) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.randint(1, most))


def _flip(draw: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        if damaged:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _remove(draw: random.Random, content: bytes) -> bytes:
    start, end = _range(draw, content)
    return content[:start] + content[end:]


def _repeat(draw: random.Random, content: bytes) -> bytes:
    start, end = _range(draw, content)
    return content[:end] + content[start:end] * draw.choice((1, 1, 5)) + content[end:]


def _zero(draw: random.Random, content: bytes) -> bytes:
    start, end = _range(draw, content)
    return content[:start] + bytes(end - start) + content[end:]


def _splice(draw: random.Random, content: bytes) -> bytes:
    (start, end), (place, _) = _range(draw, content), _range(draw, content)
    return content[:place] + content[start:end] + content[place + end - start :]


def _noise(draw: random.Random, content: bytes) -> bytes:
    start, end = _range(draw, content, 16)
    return content[:start] + draw.randbytes(end - start) + content[end:]


_ON_BYTES: dict[str, Damage] = {
    "flip": _flip, "cut": _cut, "remove": _remove, "repeat": _repeat, "zero": _zero, "splice": _splice, "noise": _noise,
}  # fmt: skip


def _inside_archive(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    inside = members(content)
    # The pickle and the graph are a few members among many.
    telling = [name for name in inside if name.endswith((".pkl", ".json"))]
    name = draw.choice(telling if draw.random() < 0.9 else list(inside))
    kind, inside[name] = _inside_member(draw, name, inside[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in inside.items():
            archive.writestr(member, data)
    return f"{kind} inside", buffer.getvalue()


def _inside_member(draw: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    if name.endswith(".json") and draw.random() < 0.9:
        return "JSON", json.dumps(_json(draw, json.loads(content))).encode()
    if name.endswith(".pkl") and draw.random() < 0.6:
        return "opcodes", _opcodes(draw, content)
    kind = draw.choice(list(_ON_BYTES))
    return kind, _ON_BYTES[kind](draw, content)


def _inside_header(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    notes = table.get("__metadata__", {})
    if "repconv.graph" in notes and draw.random() < 0.8:
        notes["repconv.graph"] = json.dumps(_json(draw, json.loads(notes["repconv.graph"])))
    else:
        table = _json(draw, table)
    text = json.dumps(table).encode()
    return "JSON inside", len(text).to_bytes(8, "little") + text + content[8 + length :]


def _json(draw: random.Random, value: Any) -> Any:
    """Return ``value`` with one place in it changed, removed, or repeated."""
    holder, key = draw.choice(_places(value))
    change = draw.choice(("odd", "odd", "other", "remove", "repeat"))
    if change == "odd":
        holder[key] = draw.choice(_ODD)
    elif change == "other":
        other, place = draw.choice(_places(value))
        # By way of text, so that nothing comes to hold itself.
        holder[key] = json.loads(json.dumps(other[place]))
    elif change == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[f"{key}_"] = holder[key]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        found += [(holder, key) for key in keys]
        stack += [holder[key] for key in keys if isinstance(holder[key], (dict, list))]
    return found


def _opcodes(draw: random.Random, content: bytes) -> bytes:
    """Return a pickle (and what follows it) with one of its opcodes removed, repeated, moved or replaced."""
    starts = [place for _, _, place in pickletools.genops(content) if place is not None]
    ends = [*starts[1:], starts[-1] + 1]
    steps = [content[start:end] for start, end in zip(starts, ends, strict=True)]
    index, other = draw.randrange(len(steps)), draw.randrange(len(steps))
    change = draw.choice(("remove", "repeat", "swap", "replace", "flip"))
    if change == "remove":
        steps[index] = b""
    elif change == "repeat":
        steps[index] *= 2
    elif change == "swap":
        steps[index], steps[other] = steps[other], steps[index]
    elif change == "replace":
        steps[index] = steps[other]
    else:
        steps[index] = _flip(draw, steps[index])
    return b"".join(steps) + content[ends[-1] :]
