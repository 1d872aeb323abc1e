"""A family's block as one convolution: rebuilt, traced, planned, proven, by the same road as whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from repconv_cli.checkpoint.families.find import FamilyBlock
from repconv_cli.checkpoint.families.modules import Branches, Eps, PaddedFirst, PerChannel, rebuild_block
from repconv_cli.drawing import picture_of
from repconv_cli.errors import InputError
from repconv_cli.facts import block_facts
from repconv_cli.graph.certificate import Certificate
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.layers import LayerGraph, Write, program_of
from repconv_cli.graph.program import is_computation
from repconv_cli.results import BlockFacts, Picture

aten = torch.ops.aten


@dataclass(frozen=True)
class Folded:
    """A block and its one convolution: ``tensors`` are its new ones, by their keys in the deploy form.

    ``facts`` and ``certificate`` are None where it was one convolution already, ``picture`` also where none was asked
    for. Nothing here holds the branches.
    """

    block: FamilyBlock
    tensors: Mapping[str, Tensor]
    facts: BlockFacts | None
    certificate: Certificate | None
    picture: Picture | None = None


class Folder:
    """Folds blocks of these tensors; with ``draw`` there is a picture of each."""

    def __init__(self, tensors: Mapping[str, Tensor], eps: Eps, seed: int = 0, *, draw: bool = False) -> None:
        self.tensors, self.eps, self.seed, self.draw = tensors, eps, seed, draw

    def fold(self, block: FamilyBlock, dtype: torch.dtype | None = None) -> Folded:
        """Return ``block`` as one convolution, proven; its tensors are cast to ``dtype`` last of all.

        Raises :class:`InputError` where it is not one.
        """
        rebuilt = rebuild_block(block, self.tensors, self.eps)
        program = program_of(rebuilt.module, rebuilt.example, WRITERS)
        # The block is the whole program: its certificate is the proof, a run of the whole would be the same again.
        fused = fuse_program(program, (), dtype=dtype, seed=self.seed)
        weight, bias = _only_layer(block, fused)
        tensors = {f"{block.target}.weight": weight}
        if bias is not None:
            tensors[f"{block.target}.bias"] = bias
        proof = fused.certificates[0] if fused.certificates else None
        if not fused.plan.blocks:
            return Folded(block, tensors, None, proof)
        planned = fused.plan.blocks[0]
        picture = picture_of(planned, fused.plan) if self.draw else None
        return Folded(block, tensors, block_facts(planned, proof), proof, picture)


def _sum(graph: LayerGraph, branches: Branches, x: fx.Node) -> fx.Node:
    total = graph.write(branches.branches[0], x)
    for branch, sign in zip(branches.branches[1:], branches.signs[1:], strict=True):
        target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
        total = graph.call(branches, target, total, graph.write(branch, x))
    return total if branches.divisor == 1 else graph.call(branches, aten.div.Tensor, total, branches.divisor)


def _per_channel(graph: LayerGraph, layer: PerChannel, x: fx.Node) -> fx.Node:
    return graph.call(layer, aten.add.Tensor if layer.is_shift else aten.mul.Tensor, x, layer.value)


def _padded_first(graph: LayerGraph, layer: PaddedFirst, x: fx.Node) -> fx.Node:
    batch, channels, *sizes = x.meta["shape"]
    # Pairs from the last axis on.
    pairs = zip(reversed(layer.padding[::2]), reversed(layer.padding[1::2]), strict=True)
    grown = (low + size + high for size, (low, high) in zip(sizes, pairs, strict=True))
    padded = graph.call(layer, aten.pad.default, x, list(layer.padding), shape=(batch, channels, *grown))
    return graph.write(layer.chain, padded)


WRITERS: dict[type[nn.Module], Write] = {Branches: _sum, PerChannel: _per_channel, PaddedFirst: _padded_first}
"""How the parts of a rebuilt block that are not torch's own layers are written as a graph."""


def _only_layer(block: FamilyBlock, fused: Fused) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias of the one layer that is left of a block."""
    calls: list[fx.Node] = [node for node in fused.program.graph.nodes if is_computation(node)]
    if len(calls) != 1 or len(calls[0].args) < 2:
        reasons = [refusal.reason for refusal in fused.plan.refusals]
        raise InputError(
            f"block {block.name!r} does not become one convolution ({reasons[0] if reasons else 'no reason found'})",
            hint="Give the architecture with --arch, and --target full.",
        )
    weight, bias = (*calls[0].args[1:3], None)[:2]
    assert isinstance(weight, fx.Node)
    tensors = fused.program.tensors
    found = tensors[str(bias.target)] if isinstance(bias, fx.Node) else None
    return tensors[str(weight.target)], found
