"""A hostile or damaged file: what writes it, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.checkpoint.tensor_checks import randomised

MARKER = "marker"
"""What a payload would make beside the file; it must never appear."""

ARCHITECTURE = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: unique, and the test's name.
        write: makes the file at a path.
        reason: a pattern in the one line that refuses it; ``None`` if it must be fused into what the small net
            computes; ``""`` if it may be refused for any reason, or fused into what the file says.
        needs_architecture: whether ``--arch`` is given, with :data:`ARCHITECTURE`.
    """

    name: str
    write: Callable[[Path], object]
    reason: str | None
    needs_architecture: bool = False


def make_net() -> nn.Module:
    """Return the small net that the files hold, with one block to fuse."""
    layers = (nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomised(nn.Sequential(*layers)).eval()


def make_state() -> dict[str, torch.Tensor]:
    """Return the net's weights by name."""
    return dict(make_net().state_dict())
