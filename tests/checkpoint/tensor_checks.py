"""Models with values that no default has, and exact comparison of tensors."""

from __future__ import annotations

import torch
from torch import nn

from repconv_cli.checkpoint import Source


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and buffer of a model values that no default has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


def same_tensors(source: Source, wanted: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors agree in names, order, types and bits."""
    found = source.tensors if source.module is None else source.module.state_dict()
    assert found is not None
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*raw), name
