"""compose is nesting: accepted means equal to torch's ``outer(inner(x))``; refused means no padding mode would be."""

from __future__ import annotations

from math import gcd

import pytest
from torch.nn import functional

from repconv_cli.algebra import compose, conv_map, merge, select
from repconv_cli.errors import InexactError

from .factories import PARTNERS_BELOW, SIZES, Draw, answer, attempt, make, naming, random_input
from .oracle import assert_equal, differs_in_every_mode, naive_composition

SMALL = [
    "dense",
    "depthwise",
    "pointwise",
    "strided",
    "dense valid",
    "even 2x2, padded after",
    "circular",
    "batch norm",
]


def show_that_refusing_is_right(outer, inner, all_sizes):
    """Some input size exists at which the naive composed convolution is wrong, whatever its padding mode."""
    naive = naive_composition(outer.torch, inner.torch)
    inputs = [(random_input(inner.in_channels, sizes), answer(inner, sizes)) for sizes in all_sizes]
    assert any(differs_in_every_mode(naive, x, outer.torch(inside)) for x, inside in inputs)


# A 1x1 with padding has a frame of one value, so repeating or wrapping the frame happens to give the same value again.
CAUTIOUS = {("replicate", "overpadded pointwise"), ("circular", "overpadded pointwise")}
# Sizes at which strides leave every possible remainder.
WITNESSES = {1: [(8,), (9,), (10,), (11,)], 2: [(9, 8), (8, 9), (10, 11)], 3: [(5, 4, 6), (4, 5, 5)]}


def judge(outer, inner, sizes, all_sizes):
    composed, reason = attempt(compose, outer.map, inner.map, sizes)
    if composed is None:
        if outer.torch.is_transposed or inner.torch.is_transposed:
            assert "a transposed convolution" in reason
        elif not (outer.has_spare_taps or inner.has_spare_taps or (outer.name, inner.name) in CAUTIOUS):
            # A delta inside a wider kernel never reads its padding, which its geometry cannot know.
            show_that_refusing_is_right(outer, inner, all_sizes)
        return
    for example in all_sizes:
        x = random_input(inner.in_channels, example)
        assert_equal(composed(x), outer.torch(answer(inner, example)))


@pytest.mark.parametrize("bias", [True, False], ids=["biased inner", "unbiased inner"])
@pytest.mark.parametrize("name", PARTNERS_BELOW)
def test_compose_is_nesting_or_rightly_refused(name, bias):
    """At fixed sizes, and for any size: then at every size."""
    outer = make(name)
    for partner in PARTNERS_BELOW[name]:
        inner = make(partner, bias=bias, seed="inner")
        with naming(outer, inner):
            for sizes in SIZES[inner.dims]:
                judge(outer, inner, sizes, [sizes])
            judge(outer, inner, None, WITNESSES.get(inner.dims, [()]))


EXACT = [
    ("pointwise", "depthwise", False),
    ("depthwise", "pointwise", False),
    ("dense", "identity", False),
    ("dense valid", "dense", True),
    ("batch norm", "dense", True),
    ("batch norm", "transposed, stride 2", True),
    ("grouped pointwise", "transposed, stride 2", True),
    ("transposed, stride 2", "pointwise", False),
    ("transposed, stride 2", "grouped pointwise", False),
    ("batch norm", "reflect", True),
    ("reflect", "pointwise", True),
    ("replicate", "batch norm", True),
    ("circular", "circular", True),
    ("circular", "circular shift", True),
    ("vertical", "horizontal", False),
    ("horizontal", "vertical", False),
    ("narrowing pointwise", "channel multiplier", True),
    ("1-d batch norm", "1-d transposed", True),
    ("3-d batch norm", "3-d", True),
    ("linear widening", "linear", True),
    ("linear", "linear batch norm", True),
]


@pytest.mark.parametrize(("outer", "inner", "bias"), EXACT)
def test_compose_takes_for_any_size(outer, inner, bias):
    """A refusal here is a fusion lost; the laws above only see that it would not be wrong."""
    outer, inner = make(outer), make(inner, bias=bias)
    composed = compose(outer.map, inner.map)
    for sizes in SIZES[inner.dims]:
        x = random_input(inner.in_channels, sizes)
        assert_equal(composed(x), outer.torch(inner.torch(x)))


REFUSED = [
    ("dense", "pointwise", True, "a biased map before zero padding"),
    ("average pool", "batch norm", True, "a biased map before zero padding"),
    ("dense", "dense", False, "zero padding 1 before reads a 3-wide kernel outside its output"),
    ("dense", "strided average pool", False, r"zero padding 1 after reads a 2-wide kernel .* for some input sizes"),
    ("dense", "reflect", False, "reflect padding inside zero padding"),
    ("grouped", "circular", False, "circular padding inside zero padding"),
    ("reflect", "reflect", False, "reflect padding after a 3×3 convolution"),
    ("reflect", "vertical", False, "reflect padding after a 3×1 convolution"),
    ("replicate", "strided pointwise", False, "replicate padding after a 1×1 convolution"),
    ("circular", "dense valid", False, "circular padding after a 3×3 convolution"),
    ("transposed, stride 2", "pointwise", True, "a biased map before"),
    ("transposed, stride 2", "dense", False, "a transposed convolution with stride over 1 takes pointwise maps"),
    ("dense", "transposed, stride 2", False, "a transposed convolution with stride over 1 takes pointwise maps"),
]


@pytest.mark.parametrize(("outer", "inner", "bias", "reason"), REFUSED)
def test_compose_refuses_with_its_reason(outer, inner, bias, reason):
    with pytest.raises(InexactError, match=reason):
        compose(make(outer).map, make(inner, bias=bias).map)


def test_an_outer_map_that_reads_more_channels_than_there_are_is_a_fault_of_the_caller():
    with pytest.raises(ValueError, match="its geometry needs"):
        compose(make("narrowing pointwise").map, make("pointwise", bias=False).map)


def test_an_outer_map_that_reads_a_slice_composes_with_that_slice():
    """A map that reads channels 2 and 3 of a deeper tensor sees those channels alone."""
    outer, inner = select(make("depthwise").map, 2, 4), make("pointwise", bias=False)
    x = random_input(4, (9, 8))
    truth = make("depthwise").torch(inner.torch(x))[:, 2:4]
    assert_equal(compose(outer, inner.map)(x), truth)


@pytest.mark.parametrize("first", SMALL)
@pytest.mark.parametrize("third", SMALL)
def test_compose_is_associative_on_outputs(third, first):
    """Both ways round give torch's answer, where both are exact."""
    sizes = (11, 12)
    x = random_input(4, sizes)
    for second in SMALL:
        a, b, c = make(first, bias=False), make(second, bias=False, seed="b"), make(third, seed="c")
        middle = tuple(a.torch(x).shape[2:])
        truth = c.torch(b.torch(a.torch(x)))
        inside, _ = attempt(compose, b.map, a.map, sizes)
        outside, _ = attempt(compose, c.map, b.map, middle)
        for pair in ((c.map, inside), (outside, a.map)):
            composed = None if None in pair else attempt(compose, *pair, sizes)[0]
            if composed is not None:
                assert_equal(composed(x), truth)


def test_three_depthwise_separable_layers_compose_both_ways_round():
    a, b, c = make("vertical", bias=False), make("horizontal", bias=False), make("batch norm")
    x = random_input(4, (9, 8))
    truth = c.torch(b.torch(a.torch(x)))
    assert_equal(compose(c.map, compose(b.map, a.map))(x), truth)
    assert_equal(compose(compose(c.map, b.map), a.map)(x), truth)


@pytest.mark.parametrize("outer", ["pointwise", "dense valid", "batch norm", "grouped pointwise", "strided pointwise"])
@pytest.mark.parametrize(("left", "right"), [("dense", "identity"), ("grouped", "pointwise"), ("dilated", "vertical")])
def test_compose_distributes_over_merge(outer, left, right):
    outer, left, right = make(outer), make(left), make(right)
    x = random_input(4, (9, 8))
    truth = outer.torch(left.torch(x) + right.torch(x))
    assert_equal(compose(outer.map, merge(left.map, right.map))(x), truth)
    unbiased = make(outer.name, bias=False)
    apart = merge(compose(outer.map, left.map), compose(unbiased.map, right.map))
    assert_equal(apart(x), outer.torch(left.torch(x)) + unbiased.torch(right.torch(x)))


@pytest.mark.parametrize(("outer_groups", "inner_groups"), [(4, 6), (6, 4), (3, 4), (12, 3), (3, 12), (6, 2)])
def test_composed_groups_become_their_greatest_common_divisor(outer_groups, inner_groups):
    """Also where neither count divides the other."""
    draw = Draw("groups")
    weight_in, weight_out = draw.normal(12, 24 // inner_groups, 3), draw.normal(24, 12 // outer_groups, 2)
    composed = compose(conv_map(weight_out, groups=outer_groups), conv_map(weight_in, padding=1, groups=inner_groups))
    assert composed.groups == gcd(outer_groups, inner_groups)
    x = random_input(24, (9,))
    inside = functional.conv1d(x, weight_in, padding=1, groups=inner_groups)
    assert_equal(composed(x), functional.conv1d(inside, weight_out, groups=outer_groups))
