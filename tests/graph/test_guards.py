"""Conditions on sizes: which tie them to the example's, and which only bound them from below."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repconv_cli.errors import InputError
from repconv_cli.graph.bounds import lower_bounds
from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.guards import conditions
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.program import ProgramModule
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs
from tests.graph.models import Formula, conv, conv_bn, randomised
from tests.graph.proof import TOLERANCE, difference, noise

SHAPE = (2, 4, 19, 18)


def size(axis: int) -> str:
    return f"L['x'].size()[{axis}]"


@pytest.mark.parametrize(
    ("guard", "bounds"),
    [
        (f"{size(2)} >= 3", {("x", 2): 3}),
        (f"{size(2)} > 5", {("x", 2): 6}),
        (f"(-2) + {size(3)} >= 5", {("x", 3): 7}),
        (f"1 + (((-3) + {size(2)}) // 2) >= 3", {("x", 2): 7}),
        (f"({size(2)} // 3) >= 1 and 2*{size(3)} >= 5", {("x", 2): 3, ("x", 3): 3}),
        ("L['xs'][0].size()[2] - 1 >= 3", {("xs_0", 2): 4}),
        (f"((-2) + {size(2)}) != 1", {("x", 2): 4}),
        (f"({size(2)} // 8) != 1", {("x", 2): 16}),
        (f"{size(2)} != 8", {("x", 2): 9}),
        (f"4*{size(0)}*((-2) + {size(2)})*({size(3)} // 2) >= 2", {("x", 2): 3, ("x", 3): 3}),
        (f"{size(2)} + {size(3)} >= 7", {("x", 2): 4, ("x", 3): 4}),
        (f"{size(2)}*{size(3)} != {size(3)}", {("x", 2): 2, ("x", 3): 2}),
        (f"(1 + {size(3)} // 4) < (1 + {size(3)} // 4)*(1 + {size(2)} // 4)", {("x", 2): 4, ("x", 3): 4}),
        (f"(3 % (3*(1 + ((-1) + {size(3)}) // 8)*(1 + ((-1) + {size(2)}) // 8))) != 0", {("x", 2): 9, ("x", 3): 9}),
        (
            f"((2 + 2*({size(2)} // 4)) % ((1 + {size(3)} // 4)*(2 + 2*({size(2)} // 4)))) != 0",
            {("x", 2): 4, ("x", 3): 4},
        ),
        (f"({size(0)}*(8*{size(2)} + 4*{size(3)}**2)) % (4*{size(0)}) == 0", {}),
        (f"(16*{size(2)} + 16*{size(2)}*{size(3)}) % (4*{size(2)} + 4*{size(2)}*{size(3)}) == 0", {}),
        (f"2*{size(2)} + {size(3)} == {size(2)} + {size(3)} + {size(2)}", {}),
        (f"{size(2)}**2 - 10*{size(2)} > 0", {("x", 2): 11}),
        (f"{size(0)} >= 2", {}),
        (f"2*{size(0)} != 1", {}),
        (f"torch.sym_max(1, (-2) + {size(2)})*torch.sym_max(1, {size(3)} // 2) != 1", {("x", 2): 4, ("x", 3): 4}),
        (f"{size(0)} == L['y'].size()[0]", {}),
        (f"(6400*{size(0)}) == (6400*L['args'][2].size()[0])", {}),
    ],
)
def test_a_condition_that_ties_no_size_gives_its_bounds(guard: str, bounds: dict[tuple[str, int], int]) -> None:
    found = conditions([guard], ["x", "xs_0", "y", "args_2"])
    assert (found.tied, found.bounds) == ([], bounds)


@pytest.mark.parametrize(
    "guard",
    [
        f"{size(2)} == 8",
        f"2*{size(0)} == 3*L['y'].size()[0]",
        f"2*{size(0)} == L['y'].size()[0]",
        f"{size(2)} <= 8",
        f"{size(2)} >= {size(3)}",
        f"8 - {size(2)} >= 3",
        f"(-1)*{size(2)} >= -9",
        f"{size(2)} % 4 >= 3",
        f"({size(2)} % 2) != 1",
        f"({size(2)} % {size(3)}) != 0",
        f"(3 % ({size(2)} % 7)) != 0",
        f"(4*{size(2)} + 2) % (4*{size(2)}) == 0",
        f"(6*{size(2)} + 4) % (4*{size(2)} + 4) == 0",
        f"{size(2)} % 1.5 == 0",
        f"{size(2)}**{size(3)} > 1",
        f"{size(2)} is {size(2)}",
        f"{size(2)} >= 4097",
        f"0 % ({size(2)}*{size(3)}) != 0",
        f"({size(0)} % 3) != 0",
        f"({size(0)} // 4) != 1",
        f"{size(2)} + (-1)*{size(3)} >= 1",
        f"{size(2)} - {size(3)} != 1",
        f"(16 // {size(2)}) >= 1",
        f"torch.sym_max(1, 8 - {size(2)}) != 1",
        f"{size(0)} != 4",
        "L['other'].size()[2] >= 3",
        f"{size(0)} >= 3",
        f"{size(2)} >= 3 and {size(2)} % 2 == 0",
        "Ne(x, 3) ?",
    ],
)
def test_any_other_condition_ties_the_sizes(guard: str) -> None:
    assert conditions([guard], ["x"]).tied == [guard]


TERMS = st.recursive(
    st.sampled_from(["H", "W", "1", "2", "3", "7"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map("({0[0]} {0[1]} {0[2]})".format),
        st.tuples(inner, st.integers(1, 5)).map("({0[0]} // {0[1]})".format),
        st.tuples(st.sampled_from(["max", "min"]), inner, inner).map("torch.sym_{0[0]}({0[1]}, {0[2]})".format),
        st.tuples(inner, st.integers(0, 2)).map("({0[0]}**{0[1]})".format),
    ),
    max_leaves=8,
)
CONDITIONS = st.one_of(
    st.tuples(TERMS, st.sampled_from([">=", ">", "<", "<=", "!=", "=="]), TERMS).map(" ".join),
    st.tuples(TERMS, st.sampled_from(["%"]), TERMS, st.sampled_from(["== 0", "!= 0"])).map(" ".join),
)


@settings(max_examples=1000, deadline=None)
@given(CONDITIONS)
def test_what_is_said_to_hold_does_at_every_size(condition: str) -> None:
    names = {"H": size(2), "W": size(3)}
    bounds = lower_bounds(ast.parse(re.sub("[HW]", lambda found: names[found[0]], condition), mode="eval").body)
    if bounds is None:
        return
    least = max(bounds.values(), default=1)
    values = [least, least + 1, least + 2, least + 5, least + 11, 4 * least + 3]
    for height, width in itertools.product(values, values):
        code = condition.replace("torch.sym_", "")
        assert eval(code, {"H": height, "W": width, "max": max, "min": min}), (height, width)  # noqa: S307 - of our own making


def test_what_the_example_itself_is_too_small_for_ties_it() -> None:
    guard = f"({size(2)} // 8) != 1"
    assert conditions([guard], ["x"], {("x", 2): 16}).bounds == {("x", 2): 16}
    assert conditions([guard], ["x"], {("x", 2): 7}).tied == [guard]


def test_of_several_bounds_the_largest_holds() -> None:
    assert conditions([f"{size(2)} >= 3", f"{size(2)} >= 7", f"{size(2)} >= 5"], ["x"]).bounds == {("x", 2): 7}


def long_enough(p: Formula, x: Tensor) -> Tensor:
    y: Tensor = p.conv(x) if x.shape[2] > 9 else -p.conv(x)
    return y


UNPADDED: list[tuple[str, Callable[[], nn.Module], tuple[int, int], int]] = [
    ("one", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), (4, 4), 1),
    ("uneven_kernel", lambda: nn.Sequential(nn.Conv2d(4, 4, (5, 4)), nn.BatchNorm2d(4)), (6, 5), 1),
    ("with_stride", lambda: nn.Sequential(nn.Conv2d(4, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3)), (9, 9), 2),
    ("after_a_pool", lambda: nn.Sequential(conv_bn(4, 4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)), (8, 8), 2),
    ("branch_on_a_size", lambda: Formula(long_enough, conv=conv(4, 4)), (10, 2), 1),
]


@pytest.mark.parametrize(("make", "smallest", "convs"), [case[1:] for case in UNPADDED], ids=[c[0] for c in UNPADDED])
def test_sizes_that_are_only_bounded_stay_free(
    make: Callable[[], nn.Module], smallest: tuple[int, int], convs: int
) -> None:
    module = randomised(make())
    program = trace(module, noise(SHAPE))
    (info,) = program.inputs
    assert program.notes == ()
    assert info.shape == (None, 4, None, None)
    assert info.smallest == (1, 1, *smallest)
    found = fuse_program(program, random_inputs(program, 1, 0)).program
    assert count_ops(found)["convs"] == convs
    for shape in ((3, 4, 24, 21), (1, 4, *smallest), (2, 4, smallest[0] + 1, smallest[1] + 3)):
        assert difference(module, found, noise(shape, seed=1)) <= TOLERANCE


def test_a_smaller_size_is_refused_when_called_also_after_writing_and_reading() -> None:
    program = trace(randomised(nn.Sequential(nn.Conv2d(4, 4, (3, 5)), nn.BatchNorm2d(4))), noise(SHAPE))
    fused = fuse_program(program, random_inputs(program, 1, 0), dtype=torch.float32).program
    again = from_json(to_json(fused), fused.tensors)
    assert again.inputs[0].smallest == (1, 1, 4, 6)
    for model in (ProgramModule(fused), ProgramModule(again)):
        assert model(torch.zeros(1, 4, 4, 6)).shape == (1, 4, 2, 2)
        with pytest.raises(InputError, match="input input: axis 3 has size 5") as caught:
            model(torch.zeros(1, 4, 4, 5))
        assert "at least 6" in str(caught.value)


def test_a_file_without_smallest_sizes_is_read_as_before() -> None:
    program = trace(randomised(conv(4, 4)), noise(SHAPE))
    written = to_json(program).replace(',"smallest":[1,1,2,2]', "")
    assert "smallest" not in written
    assert from_json(written, program.tensors).inputs[0].smallest == ()


@pytest.mark.parametrize("pairs", [("ab", "ac"), ("ba", "ca"), ("ab", "bc"), ("cb", "ba"), ("ac", "bc")])
def test_of_inputs_of_one_size_all_are_as_the_first(pairs: tuple[str, str]) -> None:
    guards = [f"L['{one}'].size()[2] == L['{other}'].size()[2]" for one, other in pairs]
    found = conditions(guards, "abcd")
    assert [found.same_as(name, 2) for name in "abcd"] == ["", "a", "a", ""]
    assert [found.same_as(name, 3) for name in "abcd"] == [""] * 4


def test_an_axis_that_a_condition_ties_by_itself_is_fixed_alone() -> None:
    several = f"{size(1)}*{size(2)} == {size(3)}"
    assert conditions([f"8 + {size(1)} == 11", several], ["x"]).fixed() == {("x", 1)}
    assert conditions([f"{size(1)} == 3", f"{size(3)} % 4 == 0 and {size(3)} != 5"], ["x"]).fixed() == {
        ("x", 1),
        ("x", 3),
    }
    assert conditions([several], ["x"]).fixed() == set()
    assert conditions([f"{size(1)} == 3", f"{size(0)} == 2"], ["x"]).fixed() == set()


def test_keywords_are_known_by_their_names() -> None:
    guards = ["L['kwargs']['x'].size()[0] == L['kwargs']['y'].size()[0]", "L['kwargs']['x'].size()[2] >= 5"]
    found = conditions(guards, ["x", "y"])
    assert (found.tied, found.same, found.bounds) == ([], [(0, ("x", "y"))], {("x", 2): 5})
    own = conditions(guards[1:], ["kwargs_x", "x"])
    assert own.bounds == {("kwargs_x", 2): 5}


class Stereo(nn.Module):
    """Two views of one size, whatever it is; each has its own way where they differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.other = conv(4, 4), conv(4, 4, 1), conv(4, 4, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if left.shape != right.shape:
            right = nn.functional.interpolate(right, left.shape[2:])
        return self.one(self.conv(left)) + self.other(right)  # type: ignore[no-any-return]


def test_inputs_of_one_size_are_free_together_and_stay_of_one_size() -> None:
    module = randomised(Stereo())
    args = noise(SHAPE, SHAPE)
    program = trace(module, args)
    assert [info.shape for info in program.inputs] == [(None, 4, None, None)] * 2
    assert program.notes == ()
    fused = fuse_program(program, random_inputs(program, 1, 0), dtype=torch.float32).program
    again = from_json(to_json(fused), fused.tensors)
    assert again.inputs[1].same_as == ("left", "", "left", "left")
    for model in (ProgramModule(fused), ProgramModule(again)):
        x, y = noise((3, 4, 12, 15), (3, 4, 12, 15), seed=1)
        assert torch.allclose(model(x, y), module(x, y), atol=1e-4)
        with pytest.raises(InputError, match="inputs right and left: axis 3 has sizes 14 and 15"):
            model(x, y[..., 1:])
    wrong = to_json(fused).replace('"same_as":["left"', '"same_as":["nobody"')
    with pytest.raises(InputError, match="does not have"):
        from_json(wrong, fused.tensors)


def test_smallest_sizes_of_another_number_than_the_axes_are_refused() -> None:
    program = trace(randomised(nn.Conv2d(4, 4, 3)), noise(SHAPE))
    written = to_json(program).replace('"smallest":[1,1,4,4]', '"smallest":[1,3]')
    with pytest.raises(InputError, match="has no usable shape"):
        from_json(written, program.tensors)


def test_a_fused_model_with_smallest_sizes_can_be_exported_again() -> None:
    program = trace(randomised(nn.Conv2d(4, 4, 3)), noise(SHAPE))
    again = trace(ProgramModule(program), noise(SHAPE))
    assert again.inputs[0].smallest == (1, 1, 4, 4)
