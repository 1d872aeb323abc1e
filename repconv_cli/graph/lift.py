"""Values that parameters alone decide, computed once and stored, where the model computes them at each call.

Position biases gathered from a table, embeddings made by a small network from fixed coordinates, normalised weights:
no input reaches them, so they are constants of the fused model. What only moves or renames values stays, as does
what would make the file much larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from repconv_cli.graph.constants import MOVES, Constants, value_inputs
from repconv_cli.graph.program import Program, unused_path

aten = torch.ops.aten

# By how much lifted constants may let all tensors grow together, and what is always allowed, in bytes.
MOST_GROWTH = 0.25
ALWAYS_ALLOWED = 1 << 16
# Stored, these would hold each value many times over.
_REPEATS = {aten.expand.default, aten.repeat.default, aten.tile.default, aten.broadcast_to.default}


@dataclass(frozen=True)
class Lifted:
    """A constant node, the key that its value is stored under, and the tensors that it is made of."""

    node: fx.Node
    key: str
    sources: tuple[str, ...]


def find_lifted(program: Program, constants: Constants, removed: set[fx.Node], taken: set[str]) -> tuple[Lifted, ...]:
    """Return the constants to store, smallest first, until the growth that is allowed is used up.

    ``removed`` are the nodes that fusing takes away, ``taken`` the keys that are in use.
    """
    ends = _ends(program, constants, removed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.tensors.values())
    budget = max(MOST_GROWTH * size, ALWAYS_ALLOWED)
    lifted = []
    for node in sorted(ends, key=lambda end: (_bytes(end), end)):
        budget -= _bytes(node)
        if budget < 0:
            break
        lifted.append(Lifted(node, _key(node, taken), tuple(constants.keys(node))))
    return tuple(lifted)


def _ends(program: Program, constants: Constants, removed: set[fx.Node]) -> list[fx.Node]:
    """Return the last constants of each chain that computes something, read by what stays."""
    works: dict[fx.Node, bool] = {}
    for node in program.graph.nodes:
        if not constants.is_fixed(node) or node.op != "call_function" or node.meta.get("is_size"):
            continue
        sources = value_inputs(node)
        if all(source.op == "get_attr" or source in works for source in sources) and node.target not in _REPEATS:
            works[node] = node.target not in MOVES or any(works.get(source, False) for source in sources)
    return [
        node
        for node, is_work in works.items()
        if is_work and _is_storable(node) and any(not works.get(user) and user not in removed for user in node.users)
    ]


def _is_storable(node: fx.Node) -> bool:
    return "shape" in node.meta and not node.meta["dtype"].is_complex


def _bytes(node: fx.Node) -> int:
    count: int = torch.Size(node.meta["shape"]).numel()
    return count * int(node.meta["dtype"].itemsize)


def _key(node: fx.Node, taken: set[str]) -> str:
    path = node.meta.get("module", "")
    key = unused_path(f"{path}.constant" if path else "constant", taken)
    taken.add(key)
    return key


def no_longer_computed(lifted: tuple[Lifted, ...], removed: set[fx.Node], constants: Constants) -> set[fx.Node]:
    """Return the constants that nothing computes any more once ``lifted`` are stored and ``removed`` are gone."""
    gone = {item.node for item in lifted}
    for node in reversed(constants.program.graph.nodes):
        if constants.is_fixed(node) and node.users and all(user in gone or user in removed for user in node.users):
            gone.add(node)
    return gone - removed
