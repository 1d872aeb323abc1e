"""RepConv against an explicit computation from its parameters, over every geometry it accepts."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from repconv_cli.errors import InputError
from repconv_cli.training import RepConv

MODES = ["zeros", "reflect", "replicate", "circular"]
CASES = {
    "default": {},
    "stride 2": {"stride": 2},
    "stride per axis": {"stride": (1, 2)},
    "more channels": {"out_channels": 6},
    "grouped": {"groups": 2},
    "grouped, more channels": {"groups": 2, "out_channels": 6},
    "depthwise": {"groups": 4, "num_conv_branches": 3},
    "pointwise convs only": {"kernel_size": 1, "num_conv_branches": 4, "pointwise": False},
    "pointwise beside pointwise": {"kernel_size": 1},
    "kernel 5": {"kernel_size": 5},
    "kernel per axis": {"kernel_size": (1, 3)},
    "dilated": {"dilation": 2},
    "dilated per axis": {"dilation": (1, 3), "kernel_size": (3, 3)},
    "dilated, stride 2": {"dilation": 2, "stride": 2},
    "padded further": {"padding": 3},
    "padded further per axis": {"padding": (1, 2), "stride": 2},
    "even kernel with whole middle": {"kernel_size": 2, "dilation": 2, "padding": 1},
    "even kernel, no pointwise": {"kernel_size": 2, "pointwise": False, "padding": 0},
    "unpadded, no pointwise": {"padding": 0, "pointwise": False},
    "no identity": {"identity": False},
    "convs alone": {"identity": False, "pointwise": False},
}


def pair(size):
    return (size, size) if isinstance(size, int) else size


def randomise(module):
    """Give every norm statistics of its own: gamma of both signs, one tiny variance."""
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data = torch.randn(norm.weight.shape, generator=generator, dtype=torch.float64)
            norm.bias.data = torch.randn(norm.bias.shape, generator=generator, dtype=torch.float64)
            norm.running_mean = torch.randn(norm.bias.shape, generator=generator, dtype=torch.float64)
            norm.running_var = torch.rand(norm.bias.shape, generator=generator, dtype=torch.float64) + 0.1
            norm.running_var[0] = 1e-6
    return module


def expected(block, x, *, is_training=False, kernel_size=3, stride=1, padding=None, dilation=1, groups=1, mode="zeros"):
    """Pad by hand, slide the kernels without padding, and read the pointwise input from the middle of each window."""
    kernel, stride, dilation = pair(kernel_size), pair(stride), pair(dilation)
    middle = [d * (k - 1) / 2 for d, k in zip(dilation, kernel, strict=True)]
    full = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
    high, wide = full if padding is None else pair(padding)
    padded = F.pad(x, (wide, wide, high, high), mode="constant" if mode == "zeros" else mode)
    parameters = dict(block.named_parameters())
    buffers = dict(block.named_buffers())

    def norm(name, y):
        if f"{name}.running_mean" not in buffers:
            return y
        mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
        if is_training:
            mean, var = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), unbiased=False)
        scale = parameters[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        return (y - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + parameters[f"{name}.bias"].view(-1, 1, 1)

    def conv(name, y, **geometry):
        key = f"{name}.conv" if f"{name}.conv.weight" in parameters else name
        return norm(
            f"{name}.norm",
            F.conv2d(y, parameters[f"{key}.weight"], parameters.get(f"{key}.bias"), groups=groups, **geometry),
        )

    count = len({name.split(".")[1] for name in parameters if name.startswith("convs.")})
    total = sum(conv(f"convs.{index}", padded, stride=stride, dilation=dilation) for index in range(count))
    if any(name.startswith("pointwise.") for name in parameters):
        rows = int(middle[0]) + stride[0] * torch.arange(total.shape[2])
        columns = int(middle[1]) + stride[1] * torch.arange(total.shape[3])
        total = total + conv("pointwise", padded[:, :, rows][:, :, :, columns])
    if block.identity is not None:
        total = total + norm("identity", x)
    return total


@pytest.mark.parametrize("norm", [True, False], ids=["norms", "plain"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_sum_of_branches_on_one_grid(name, mode, norm):
    options = {"out_channels": 4, **CASES[name]}
    torch.manual_seed(0)
    block = randomise(RepConv(4, norm=norm, padding_mode=mode, **options).double()).eval()
    geometry = {
        key: options[key] for key in ("kernel_size", "stride", "padding", "dilation", "groups") if key in options
    }
    for height, width in [(9, 8), (8, 7)]:
        x = torch.randn(2, 4, height, width, dtype=torch.float64)
        torch.testing.assert_close(block(x), expected(block, x, mode=mode, **geometry), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", ["default", "depthwise", "stride 2"])
def test_in_training_each_branch_is_normalised_by_its_own_batch(name):
    options = {"out_channels": 4, **CASES[name]}
    torch.manual_seed(0)
    block = randomise(RepConv(4, **options).double()).train()
    geometry = {key: options[key] for key in ("stride", "groups") if key in options}
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), expected(block, x, is_training=True, **geometry), rtol=1e-12, atol=1e-10)


def test_padding_mode_changes_the_output():
    """So that a mode accepted and ignored is seen."""
    outputs = []
    for mode in MODES:
        torch.manual_seed(0)
        outputs.append(RepConv(2, 2, padding_mode=mode).eval()(torch.arange(50.0).view(1, 2, 5, 5)))
    for index, output in enumerate(outputs):
        assert not any(torch.allclose(output, other) for other in outputs[index + 1 :])


def test_the_input_is_left_unchanged_without_any_norm():
    x = torch.randn(1, 4, 5, 5)
    before = x.clone()
    RepConv(4, 4, norm=False)(x)
    assert torch.equal(x, before)


def test_state_dict_keys_with_norms():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    branches = [f"{name}.norm.{part}" for name in ("convs.0", "convs.1", "pointwise") for part in norm]
    convs = ["convs.0.conv.weight", "convs.1.conv.weight", "pointwise.conv.weight"]
    identity = [f"identity.{part}" for part in norm]
    assert sorted(RepConv(4, 4, num_conv_branches=2).state_dict()) == sorted([*branches, *convs, *identity])


def test_state_dict_keys_without_norms():
    keys = ["convs.0.weight", "convs.0.bias", "pointwise.weight", "pointwise.bias"]
    assert list(RepConv(4, 4, norm=False).state_dict()) == keys


@pytest.mark.parametrize(
    ("options", "has_identity"),
    [
        ({}, True),
        ({"norm": False}, True),
        ({"dilation": 2}, True),
        ({"identity": False}, False),
        ({"out_channels": 6}, False),
        ({"stride": 2}, False),
        ({"stride": (1, 2)}, False),
        ({"padding": 2}, False),
        ({"padding": 0, "pointwise": False}, False),
    ],
)
def test_identity_is_there_exactly_where_it_is_possible_and_not_declined(options, has_identity):
    assert (RepConv(4, **{"out_channels": 4, **options}).identity is not None) is has_identity


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_conv_branches": 0}, "num_conv_branches is 0; needed: at least 1"),
        ({"padding": 0}, r"no pointwise branch fits a conv whose output is \(-2, -2\) larger than its input"),
        ({"kernel_size": 2}, r"no pointwise branch fits a conv whose output is \(1, 1\) larger than its input"),
        ({"out_channels": 6, "identity": True}, "no identity branch from 4 to 6 channels with stride"),
        ({"stride": 2, "identity": True}, r"no identity branch from 4 to 4 channels with stride \(2, 2\)"),
        ({"padding": 2, "identity": True}, r"no identity branch .* and an output \(2, 2\) larger than the input"),
    ],
)
def test_a_branch_that_cannot_share_the_grid_is_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        RepConv(4, **{"out_channels": 4, **options})


@pytest.mark.parametrize("norm", [True, False], ids=["norms", "plain"])
def test_a_pickled_block_is_its_class_and_torch_layers_alone_and_computes_the_same(norm):
    block = randomise(RepConv(4, 4, num_conv_branches=2, norm=norm)).float().eval()
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    classes = [RepConv, nn.ModuleList, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Identity]
    with torch.serialization.safe_globals(classes):
        loaded = torch.load(file, weights_only=True)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(loaded(x), block(x))


def test_an_exported_block_computes_the_same_at_other_sizes():
    block = randomise(RepConv(4, 4, num_conv_branches=2).double()).eval()
    free = torch.export.Dim.AUTO
    example = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    program = torch.export.export(block, (example,), dynamic_shapes=({0: free, 2: free, 3: free},))
    x = torch.randn(5, 4, 7, 11, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-12, atol=1e-12)
