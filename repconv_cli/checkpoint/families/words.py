"""What is told of a family's blocks, from names and shapes alone. No torch here."""

from __future__ import annotations

from collections import Counter
from math import prod

from repconv_cli.checkpoint.families.find import Found
from repconv_cli.checkpoint.families.parts import Layer, Minus, Part, Pool, Sum, children, leaves
from repconv_cli.checkpoint.families.shapes import Shapes, groups_of, input_channels, main_layer


def branches_of(part: Part, shapes: Shapes) -> tuple[str, ...]:
    """Return the branches of a block, each as its chain of kernels; the largest first, the identity last.

    Equal ones are counted: ``("4 × 3×3", "1×1", "identity")``.
    """
    channels = input_channels(part, shapes)
    is_depthwise = groups_of(part, shapes) == channels > 1
    kernel = shapes[f"{main_layer(part).path}.weight"][2:]
    found: Counter[tuple[int, str]] = Counter()
    for branch in _chains(part):
        labels = [(_kernel(leaf, kernel, shapes), isinstance(leaf, Pool)) for leaf in leaves(branch)]
        sizes = [(size, is_pool) for size, is_pool in labels if size is not None]
        suffix = " depthwise" if is_depthwise else ""
        chain = "→".join(("average " if pool else "") + _times(size) + ("" if pool else suffix) for size, pool in sizes)
        found[max((prod(size) for size, _ in sizes), default=0), chain or "identity"] += 1
    ordered = sorted(found, key=lambda branch: (-branch[0], branch[1]))
    return tuple(name if found[area, name] == 1 else f"{found[area, name]} × {name}" for area, name in ordered)


def kind_of(branches: tuple[str, ...]) -> str:
    """Return a block's kind.

    >>> kind_of(("2 × 3×3 depthwise", "identity"))
    '2 × 3×3 + identity depthwise'
    """
    joined = " + ".join(branches)
    if all(branch.endswith(" depthwise") or branch == "identity" for branch in branches):
        return joined.replace(" depthwise", "") + " depthwise"
    return joined


def _chains(part: Part) -> list[Part]:
    """Return the branches that a block sums; what follows the sum belongs to none of them."""
    if isinstance(part, Sum):
        return [chain for branch in part.branches for chain in _chains(branch)]
    if isinstance(part, Minus):
        return _chains(part.part)
    inner = children(part)
    return _chains(inner[0]) if inner and any(isinstance(leaf, Sum) for leaf in inner) else [part]


def _kernel(leaf: Part, kernel: tuple[int, ...], shapes: Shapes) -> tuple[int, ...] | None:
    if isinstance(leaf, Layer):
        return shapes[f"{leaf.path}.weight"][2:] or (1,)
    return kernel if isinstance(leaf, Pool) else None


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes)) if len(sizes) > 1 else str(sizes[0])


def eps_alone(found: Found, eps: float | None) -> float:
    """Return the eps that all norms are taken to have."""
    return found.family.eps if eps is None else eps


def assumptions(found: Found, eps: float | None) -> tuple[str, ...]:
    """Return what weights alone do not tell and was taken to be so."""
    if not found.blocks:
        return ()
    whose = f"as {found.family.name} uses it; --eps sets it" if eps is None else "not the family's own"
    told = [f"every norm has eps {eps_alone(found, eps):g} ({whose})"]
    if any(sum(isinstance(leaf, Layer) for leaf in leaves(block.part)) > 1 for block in found.blocks):
        told.append("the branches of a block have one stride, and kernels that lie centred on each other")
    if any(block.guesses_identity for block in found.blocks):
        told.append("a block with as many outputs as inputs has an identity branch, which has no key")
    return tuple(told)


def notes(found: Found) -> tuple[str, ...]:
    """Return what was done with keys that are in no block, one sentence each."""
    told = [f"known by its keys: {found.family.name}"]
    counters = [key for block in found.blocks for key in block.removed if key not in block.sources]
    if counters:
        told.append(f"{len(counters)} counters of training batches went with their norms")
    if found.dead:
        told.append(f"{len(found.dead)} tensors that the deploy form lacks were left out, such as {found.dead[0]}")
    if found.replaced:
        told.append(
            f"{len(found.replaced)} tensors lay unused under a deploy key beside the branches, such as "
            f"{found.replaced[0]}: replaced"
        )
    if found.fused and found.blocks:
        told.append(f"half fused: {found.fused} blocks were in deploy form already and stay as they are")
    elif found.fused or not found.blocks:
        told.append("every block is in deploy form already: nothing to fuse")
    return tuple(told)
