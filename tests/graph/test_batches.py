"""A batch that a trace fixed is free where the graph is the same at the batch that it was fixed to, and only there."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.convert import inspect
from repconv_cli.graph.batches import lengths_are_sizes
from repconv_cli.graph.program import ProgramModule
from repconv_cli.graph.trace import trace
from repconv_cli.options import Options
from tests.graph.models import conv, randomised
from tests.graph.proof import noise

SEEN = 2


class Head(nn.Module):
    """Adds an offset to each position, kept for the shape that it saw last, as the heads of detectors do."""

    shape: torch.Size | None = None

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.shape != x.shape:
            self.offsets = self.make(y)
            self.shape = x.shape
        return y + self.offsets


def from_sizes(y: Tensor) -> Tensor:
    return torch.arange(y.shape[-1]).type_as(y) + y.new_full((y.shape[-2], 1), 0.5)


def seen(make: Callable[[Tensor], Tensor] = from_sizes) -> Head:
    """Return a head that has seen a batch of ``SEEN``."""
    module = randomised(Head(make)).float().eval()
    with torch.no_grad():
        module(torch.randn(SEEN, 3, 6, 6))
    return module


def is_free(module: nn.Module, batch: int = SEEN) -> bool:
    program = trace(module, (torch.randn(batch, 3, 6, 6),))
    return program.inputs[0].shape[0] is None


def require_equal(module: nn.Module) -> None:
    program = ProgramModule(trace(copy.deepcopy(module), (torch.randn(SEEN, 3, 6, 6),)))
    for batch in (1, 2, 3, 5):
        x = torch.randn(batch, 3, 6, 6)
        torch.testing.assert_close(program(x), copy.deepcopy(module)(x), rtol=0, atol=0)


def test_a_shape_that_was_kept_does_not_fix_the_batch() -> None:
    for batch in (SEEN, SEEN + 1, SEEN + 2):
        assert is_free(seen(), batch)
    require_equal(seen())


def test_a_length_does_not_fix_the_batch() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 4)
            self.token = nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.token.expand(len(x), -1, -1, -1)

    module = randomised(Tokens()).float().eval()
    assert is_free(module)
    require_equal(module)


def stale(module: Head) -> Head:
    module.offsets = torch.nextafter(module.offsets, torch.tensor(9.0))
    return module


def of_another_type(module: Head) -> Head:
    module.offsets = module.offsets.double()
    return module


@pytest.mark.parametrize("change", [stale, of_another_type])
def test_what_was_kept_must_be_what_would_be_computed(change: Callable[[Head], Head]) -> None:
    assert not is_free(change(seen()))
    assert not is_free(change(seen()), batch=3)


class Special(nn.Module):
    """Does at some batches what it does at no other."""

    def __init__(self, usual: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], *batches: int) -> None:
        super().__init__()
        self.conv = conv(3, 4)
        self.usual, self.other, self.batches = usual, other, batches

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return self.other(y) if any(x.shape[0] == batch for batch in self.batches) else self.usual(y)


@pytest.mark.parametrize(
    ("usual", "other"),
    [
        (torch.relu, torch.abs),
        (torch.relu, lambda y: y),
        (lambda y: y + 1.0, lambda y: y + 2.0),
        (lambda y: y.sum(1), lambda y: y.sum(2)),
        (lambda y: (y, y * 2.0), lambda y: (y * 2.0, y)),
        (lambda y: y.clamp(max=1e6), lambda y: y.clamp(max=2e6)),
        (lambda y: y.flatten(1) * y.shape[0], lambda y: y.flatten(1) * 3),
        (lambda y: y.transpose(0, 1).flatten(1), lambda y: y.flatten(2).transpose(0, 1).flatten(1) + y.shape[0]),
    ],
)
def test_another_graph_at_one_batch_keeps_it_fixed(
    usual: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]
) -> None:
    assert not is_free(randomised(Special(usual, other, SEEN)).float())


@pytest.mark.parametrize("batch", [SEEN, 3, 7])
def test_several_special_batches(batch: int) -> None:
    same = torch.relu
    assert is_free(randomised(Special(same, same, SEEN, 7)).float(), batch)
    assert not is_free(randomised(Special(same, torch.abs, SEEN, 7)).float(), batch)


@pytest.mark.parametrize(
    "other",
    [lambda y: y + 1.0, lambda y: y[0], lambda y: y.sum(1), lambda y: (y, y), lambda y: y > 0, lambda y: y / 0.0],
)
def test_another_graph_at_one_sample_keeps_it_fixed(other: Callable[[Tensor], Tensor]) -> None:
    """torch takes a size that it frees for more than one, and says nothing of one."""
    special, plain = (randomised(Special(torch.relu, one, 1)).float() for one in (other, torch.relu))
    for batch in (1, 2, 5):
        asked = Options(input=((batch, 3, 6, 6),))
        assert inspect(special, asked).input.shapes[0][0] == batch
        assert inspect(plain, asked).input.shapes[0][0] is None


def test_what_takes_no_single_sample_is_free() -> None:
    def fail(y: Tensor) -> Tensor:
        raise ValueError("needs two samples")

    module = randomised(Special(torch.relu, fail, 1)).float()
    assert inspect(module, Options(input=((2, 3, 6, 6),))).input.shapes[0][0] is None


def test_numbers_of_the_batch_are_compared_at_the_batch() -> None:
    module = Special(lambda y: y.flatten(1) * y.shape[0], lambda y: y.flatten(1) * SEEN, SEEN)
    assert is_free(randomised(module).float())
    require_equal(module)


def test_inputs_of_several_batches_stay_fixed() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(3, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.conv(x) * (1.0 if x.shape[0] == SEEN else 2.0), y + 1.0

    program = trace(randomised(Pair()), (*noise((SEEN, 3, 6, 6)), *noise((4, 5))))
    assert program.inputs[0].shape[0] == SEEN


def test_len_is_pythons_own_again() -> None:
    own = len
    with lengths_are_sizes(seen()):
        # This is a file of the module's class.
        assert len is not own
        assert builtins.len is own
        assert len([1, 2]) == 2
        assert len(torch.ones(3, 2)) == 3
        with pytest.raises(TypeError):
            len(torch.ones(()))
    assert len is own


def test_len_is_pythons_own_again_after_an_error() -> None:
    own = len
    with pytest.raises(ZeroDivisionError), lengths_are_sizes(seen()):
        1 / 0  # noqa: B018
    assert len is own
