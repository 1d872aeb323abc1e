"""A near miss and what must be left of it, and the one judgement that all of them pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from repconv_cli.graph.plan import count_ops
from tests.graph.models import Formula, randomised
from tests.graph.proof import TOLERANCE, difference, fused, is_unchanged, noise, snapshot

SHAPE = (2, 4, 9, 9)


@dataclass(frozen=True)
class Refused:
    """A model, the reason expected (a regular expression), and (convolutions, norms, operations) left."""

    name: str
    make: Callable[[], nn.Module]
    reason: str
    left: tuple[int, int, int]
    shape: tuple[int, ...] = SHAPE


def formula(function: Callable[..., Any], **parts: nn.Module | Tensor) -> Callable[[], nn.Module]:
    return lambda: Formula(function, **parts)


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def fixed_size(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Return ``function`` with the sizes of its output written down, so that they are not free."""

    def flattened(part: Any, x: Tensor) -> Tensor:
        y = function(part, x)
        return y.reshape(x.shape[0], int(y[0].numel()))

    return flattened


def assert_refused(case: Refused) -> None:
    """Fail unless ``case`` is left with its reason and a named place, computing the same, its module untouched."""
    module = randomised(case.make())
    before = snapshot(module)
    found = fused(module, noise(case.shape), is_spatial_free=False)
    counts = count_ops(found.program)
    assert (counts["convs"], counts["norms"], counts["ops"]) == case.left
    assert difference(module, found.program, noise((3, *case.shape[1:]), seed=1)) <= TOLERANCE
    assert is_unchanged(module, before)
    reasons = [refusal.reason for refusal in found.plan.refusals]
    assert any(re.search(case.reason, reason) for reason in reasons), reasons
    assert all(refusal.name for refusal in found.plan.refusals)
