"""A family's block as one convolution: rebuilt, traced, planned, proven, by the same road as whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from repconv_cli.checkpoint.families.find import FamilyBlock
from repconv_cli.checkpoint.families.modules import Eps, rebuild_block
from repconv_cli.errors import InputError
from repconv_cli.facts import block_facts
from repconv_cli.graph.certificate import Certificate
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.program import Program, is_computation
from repconv_cli.graph.trace import trace
from repconv_cli.results import BlockFacts


@dataclass(frozen=True)
class Folded:
    """A block and its one convolution: ``tensors`` are its new ones in float64, by their keys in the deploy form.

    ``facts`` and ``certificate`` are None where it was one convolution already. Nothing here holds the branches.
    """

    block: FamilyBlock
    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    facts: BlockFacts | None
    certificate: Certificate | None


class Folder:
    """Folds blocks; what has the same structure and shapes is traced once."""

    def __init__(self, tensors: Mapping[str, Tensor], eps: Eps, seed: int = 0) -> None:
        self.tensors, self.eps, self.seed = tensors, eps, seed
        self.traced: dict[str, Program] = {}

    def fold(self, block: FamilyBlock) -> Folded:
        """Return ``block`` as one convolution, proven.

        Raises :class:`InputError` where it is not one.
        """
        program = self._program(block)
        # The block is the whole program: its certificate is the proof, a run of the whole would be the same again.
        fused = fuse_program(program, (), seed=self.seed)
        weight, bias = _only_layer(block, fused)
        tensors = {f"{block.target}.weight": weight}
        if bias is not None:
            tensors[f"{block.target}.bias"] = bias
        proof = fused.certificates[0] if fused.certificates else None
        facts = block_facts(fused.plan.blocks[0], proof) if fused.plan.blocks else None
        return Folded(block, tuple(tensors), tensors, facts, proof)

    def _program(self, block: FamilyBlock) -> Program:
        rebuilt = rebuild_block(block, self.tensors, self.eps)
        module = rebuilt.module
        structure = f"{module}{tuple(rebuilt.example.shape)}"
        if structure not in self.traced:
            self.traced[structure] = self._trace(block)
        traced = self.traced[structure]
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return replace(traced, tensors={key: own[key].detach() for key in traced.tensors})

    def _trace(self, block: FamilyBlock) -> Program:
        # A trace reads no values, and zeros that nothing has read or written take no memory.
        blank = {key: torch.zeros(self.tensors[key].shape, dtype=torch.float64) for key in block.sources}
        rebuilt = rebuild_block(block, blank, self.eps)
        traced = trace(rebuilt.module, (rebuilt.example,))
        # Of the tensors only the names are of use to the next block.
        return replace(traced, tensors={key: tensor.to("meta") for key, tensor in traced.tensors.items()})


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
    return tensors[str(weight.target)].to(torch.float64), found
