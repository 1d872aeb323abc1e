"""Graphs that were tampered with: refused when they are read, or they run and are judged by what they compute."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.errors import InputError
from repconv_cli.graph.program import Program, ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.sizes import check_sizes
from repconv_cli.graph.trace import trace
from repconv_cli.options import Limits
from repconv_cli.verdict import compare, random_inputs
from tests.graph.models import RepVGG, randomised
from tests.graph.proof import noise

COUNT = 400
NUMBERS = [0, -1, 1, 2, 7, 2**31, 2**63 - 1, -(2**63), 10**12, 10**30, 0.5, 1e308, True, None]
CALLS = ["aten.relu.default", "aten.add.Tensor", "aten.conv2d.default", "aten.zeros.default", "getitem", "size.mul"]
TEXTS = [*CALLS, "", "os.system", "eval", "__import__('os').system('true')", "aten.__class__.default", "\x1b[31m"]
VALUES = [{"node": 0}, {"node": 10**6}, {"node": -1}, {"dtype": "int8"}, {"float": "nan"}, {"device": "cuda"},
          {"layout": "sparse"}, {"dtype": "object"}, {}, [], [[]], [10**9, 10**9], {"node": True}]  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Program:
    module = nn.Sequential(
        RepVGG(), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3), nn.Softmax(1)
    )
    return trace(randomised(module), noise((2, 4, 7, 7)))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a document with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def change(holder: Any, key: Any, other_holder: Any, other: Any, draw: random.Random) -> None:
    """Change one place in place; ``other`` is a place to take a value from."""
    values: list[Callable[[], Any]] = [
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice(TEXTS),
        lambda: copy.deepcopy(draw.choice(VALUES)),
        lambda: copy.deepcopy(other_holder[other]),
        lambda: not holder[key],
    ]
    action = draw.randrange(len(values) + 3)
    if action < len(values):
        holder[key] = values[action]()
    elif action == len(values):
        del holder[key]
    elif isinstance(holder, list) and action == len(values) + 1:
        holder.append(copy.deepcopy(holder[key]))
    elif isinstance(holder, list):
        draw.shuffle(holder)
    else:
        holder["more"] = 1


def changed(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return a copy with one to three places changed."""
    mutant = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        found = list(places(mutant))
        change(*draw.choice(found), *draw.choice(found), draw)
    return mutant


def test_each_mutant_is_refused_or_judged_by_what_it_computes(program: Program) -> None:
    document = json.loads(to_json(program))
    original = ProgramModule(program)
    weights = {key: tensor.clone() for key, tensor in program.tensors.items()}
    draw = random.Random(1)
    seen: Counter[str] = Counter()
    for _ in range(COUNT):
        mutant = changed(document, draw)
        again, refusal = read(mutant, program)
        if again is None:
            assert "\x1b" not in refusal
            assert 0 < len(refusal) < 600
            seen["refused"] += 1
        else:
            seen[judge(program, original, again)] += 1
    assert all(torch.equal(tensor, weights[key]) for key, tensor in program.tensors.items())
    assert seen.total() == COUNT
    assert seen["refused"] > COUNT / 2
    assert seen["equal"]
    assert seen["another model"]


def read(mutant: dict[str, Any], program: Program) -> tuple[Program | None, str]:
    """Return the program, or None and why it is refused."""
    try:
        again = from_json(json.dumps(mutant), program.tensors)
        check_sizes(again)
    except InputError as refusal:
        return None, str(refusal)
    return again, ""


def judge(program: Program, original: nn.Module, again: Program) -> str:
    """Return what a mutant that was read computes; the verdict must say the same."""
    same_inputs = [(i.shape, i.dtype) for i in again.inputs] == [(i.shape, i.dtype) for i in program.inputs]
    if not same_inputs or again.arguments != program.arguments or again.keywords != program.keywords:
        # Such a file is told apart before anything is run.
        return "called in another way"
    (x,) = next(random_inputs(program, 1, 0))
    with torch.no_grad():
        expected = original(x)
        try:
            found = ProgramModule(again)(x)
        except (RuntimeError, IndexError, TypeError, ValueError):
            # There is no kernel for it, or one that checks more than shapes do.
            return "cannot run"
    same_form = isinstance(found, Tensor) and found.shape == expected.shape
    difference = float((found - expected).abs().max() / expected.abs().max()) if same_form else float("inf")
    verdict = compare(program, original, again, ProgramModule(again), random_inputs(program, 1, 0), Limits())
    if 1e-6 < difference < 1e-3:
        # As small as rounding may be, such as another eps: comparing the file with a new plan tells it.
        return "close"
    assert bool(verdict) == (difference <= 1e-6)
    return "equal" if verdict else "another model"
