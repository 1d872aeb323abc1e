from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn


def saved(path: Path, *layers: nn.Module) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(*layers).eval()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    torch.save(model, path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model of one block, quick to trace."""
    return saved(tmp_path / "small.pt", nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


@pytest.fixture
def partly_refused(tmp_path: Path) -> Path:
    """A model with one block to fuse, and one pair of convs that would be dearer as one."""
    pair = (nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False), nn.Conv2d(4, 8, 1))
    return saved(tmp_path / "partly.pt", nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *pair, nn.ReLU())
