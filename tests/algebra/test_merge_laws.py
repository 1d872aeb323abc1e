"""merge is the sum, subtract the difference: accepted means equal to torch's; refused means rightly so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from repconv_cli.algebra import Axis, conv_map, merge, scale_map, subtract
from repconv_cli.errors import InexactError

from .factories import SIZES, SUMMANDS, answer, attempt, make, naming, random_input
from .oracle import assert_equal, differs_in_every_mode, naive_sum

ALIKE = [
    "dense",
    "depthwise",
    "pointwise",
    "dilated",
    "even 4x4 same",
    "even 2x2, padded after",
    "identity",
    "batch norm",
]


def judge(left, right, sizes, operation, sign):
    """Compare at ``sizes`` (None: at all of them); a sum torch itself would refuse or broadcast must be refused."""
    all_sizes = SIZES[left.dims] if sizes is None else [sizes]
    examples = [random_input(left.in_channels, s) for s in all_sizes]
    outputs = [(answer(left, s), answer(right, s)) for s in all_sizes]
    merged, reason = attempt(operation, left.map, right.map, sizes)
    if merged is None:
        if "padding modes differ" in reason:
            # A delta inside a wider kernel never reads its padding, which its geometry cannot know.
            assert (
                (left.has_spare_taps or right.has_spare_taps)
                or any(
                    differs_in_every_mode(naive_sum(left.torch, right.torch), x, a + b)
                    for x, (a, b) in zip(examples, outputs, strict=True)
                    if a.shape == b.shape
                )
                or all(a.shape != b.shape for a, b in outputs)
            )
        elif left.torch.is_transposed or right.torch.is_transposed:
            assert "a transposed convolution beside" in reason
        else:
            assert left.torch.stride != right.torch.stride or all(a.shape != b.shape for a, b in outputs)
        return
    if sizes is not None:
        assert outputs[0][0].shape == outputs[0][1].shape, "no sum exists at this size, yet it was merged"
    for x, (a, b) in zip(examples, outputs, strict=True):
        if a.shape == b.shape:
            assert_equal(merged(x), a + sign * b)


@pytest.mark.parametrize(("operation", "sign"), [(merge, 1), (subtract, -1)])
@pytest.mark.parametrize("name", SUMMANDS)
def test_merge_is_the_sum_and_subtract_the_difference_or_rightly_refused(name, operation, sign):
    """Every ordered pair, so merging is commutative too; at fixed sizes and for any size."""
    left = make(name)
    for partner in SUMMANDS[name]:
        right = make(partner, seed="right")
        with naming(left, right):
            for sizes in [*SIZES[left.dims], None]:
                judge(left, right, sizes, operation, sign)


@pytest.mark.parametrize("first", ALIKE)
@pytest.mark.parametrize("second", ALIKE)
def test_merge_is_associative_and_commutative_on_outputs(first, second):
    x = random_input(4, (9, 8))
    for third in ("grouped", "horizontal", "average pool", "scale"):
        a, b, c = make(first), make(second, seed="b"), make(third, seed="c")
        truth = a.torch(x) + b.torch(x) + c.torch(x)
        assert_equal(merge(merge(a.map, b.map), c.map)(x), truth)
        assert_equal(merge(a.map, merge(b.map, c.map))(x), truth)
        assert_equal(merge(c.map, merge(b.map, a.map))(x), truth)


def test_a_map_minus_itself_is_zero():
    sample = make("dense")
    difference = subtract(sample.map, sample.map)
    assert not difference.weight.any()
    assert not difference.bias.any()


def test_merged_groups_become_their_greatest_common_divisor():
    four, six = torch.randn(12, 3, 3, 3).double(), torch.randn(12, 2, 1, 1).double()
    merged = merge(conv_map(four, padding=1, groups=4), conv_map(six, groups=6))
    assert merged.groups == 2
    x = random_input(12, (5, 6))
    assert_equal(merged(x), functional.conv2d(x, four, padding=1, groups=4) + functional.conv2d(x, six, groups=6))


def test_a_dilated_branch_beside_its_own_lattice_keeps_its_dilation():
    """Writing it out would be many times the work: two branches of dilation 2 merge into one of dilation 2."""
    a, b = torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2, 5, 5).double()
    merged = merge(conv_map(a, padding=2, dilation=2), conv_map(b, padding=4, dilation=2))
    assert (merged.weight.shape[2:], merged.dilation) == ((5, 5), (2, 2))
    x = random_input(2, (9, 8))
    truth = functional.conv2d(x, a, padding=2, dilation=2) + functional.conv2d(x, b, padding=4, dilation=2)
    assert_equal(merged(x), truth)


def test_branches_of_coprime_dilation_meet_on_the_dense_lattice():
    a, b = torch.randn(2, 2, 3).double(), torch.randn(2, 2, 3).double()
    merged = merge(conv_map(a, padding=2, dilation=2), conv_map(b, padding=3, dilation=3))
    assert (merged.weight.shape[2:], merged.dilation) == ((7,), (1,))
    x = random_input(2, (9,))
    truth = functional.conv1d(x, a, padding=2, dilation=2) + functional.conv1d(x, b, padding=3, dilation=3)
    assert_equal(merged(x), truth)


def test_strides_may_differ_where_the_output_is_a_single_position():
    a, b = torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2, 2, 2).double()
    left, right = conv_map(a, stride=2), conv_map(b, stride=3)
    x = random_input(2, (3, 4))
    truth = functional.conv2d(x, a, stride=2) + functional.conv2d(x, b, stride=3)
    assert truth.shape[2:] == (1, 1)
    assert_equal(merge(left, right, (3, 4))(x), truth)
    with pytest.raises(InexactError, match="stride 2×2 beside stride 3×3"):
        merge(left, right)


def test_maps_that_read_different_channels_merge_over_all_of_them():
    from repconv_cli.algebra import select

    sample = make("depthwise")
    first, last = select(sample.map, 0, 2), select(sample.map, 2, 4)
    x = random_input(4, (9, 8))
    y = sample.torch(x)
    assert_equal(merge(first, last)(x), y[:, :2] + y[:, 2:])


REFUSED = [
    ("dense", "reflect", None, "padding modes differ where kernels reach past the border: reflect beside zeros"),
    ("circular", "replicate", None, "padding modes differ .* circular beside replicate"),
    ("dense", "strided", None, "stride 1×1 beside stride 2×2"),
    ("dense", "transposed, stride 2", None, "a transposed convolution beside a branch of another geometry"),
    ("dense", "channel multiplier", None, "4 channels beside 8"),
    ("dense", "dense valid", None, "output sizes differ whatever the input size"),
    ("strided", "strided average pool", (9, 8), "output sizes 5 beside 4 from input size 9"),
]


@pytest.mark.parametrize(("left", "right", "sizes", "reason"), REFUSED)
def test_merge_refuses_with_its_reason(left, right, sizes, reason):
    for operation in (merge, subtract):
        with pytest.raises(InexactError, match=reason):
            operation(make(left).map, make(right).map, sizes)


def test_a_pointwise_branch_joins_any_padding_mode():
    """A 1x1 never reaches the border, so its own mode does not matter."""
    pointwise = make("pointwise")
    x = random_input(4, (9, 8))
    for name in ("reflect", "replicate", "circular", "dense"):
        other = make(name)
        assert_equal(merge(other.map, pointwise.map)(x), other.torch(x) + pointwise.torch(x))


def test_a_mode_that_is_never_read_at_this_size_does_not_stand_in_the_way():
    """Padding after that the stride leaves unread: reflect beside zeros is exact at size 8 and not at 9."""
    a, b = torch.randn(1, 1, 2).double(), torch.randn(1, 1, 3).double()
    unread = conv_map(a, stride=2, padding=((0, 1),), padding_mode="reflect")
    padded = conv_map(b, stride=2, padding=1)
    x = random_input(1, (8,))
    truth = functional.conv1d(functional.pad(x, (0, 1), "reflect"), a, stride=2) + functional.conv1d(
        x, b, stride=2, padding=1
    )
    assert_equal(merge(unread, padded, (8,))(x), truth)
    with pytest.raises(InexactError, match="padding modes differ"):
        merge(unread, padded, (9,))


def test_a_scale_merges_at_the_index_of_the_padding():
    axis = Axis(4, 1, 1, 1, 2)
    dense = conv_map(torch.zeros(1, 1, 4), padding=((1, 2),))
    merged = merge(dense, scale_map(torch.ones(1), dims=1))
    assert merged.weight.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]
    assert merged.geometry.axes == (axis,)


def test_a_pointwise_branch_leaves_the_dilation_of_the_other_as_it_is():
    """One tap has no step of its own: written out, a dilated 3x3 of step 12 would become a 25x25."""
    weight, pointwise = torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2, 1, 1).double()
    merged = merge(conv_map(weight, padding=12, dilation=12), conv_map(pointwise))
    assert (merged.weight.shape[2:], merged.dilation) == ((3, 3), (12, 12))
    x = random_input(2, (14, 15))
    truth = functional.conv2d(x, weight, padding=12, dilation=12) + functional.conv2d(x, pointwise)
    assert_equal(merged(x), truth)
