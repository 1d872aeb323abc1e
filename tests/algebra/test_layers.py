"""layer_map against torch's own layers in eval mode, and the layers that have no map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repconv_cli.algebra import layer_map
from repconv_cli.errors import InexactError

from .factories import Draw, random_input
from .oracle import assert_equal

LAYERS = {
    "conv 1-d": (nn.Conv1d(4, 6, 3, padding=1), (9,)),
    "conv 1-d circular": (nn.Conv1d(4, 6, 4, padding=2, padding_mode="circular"), (9,)),
    "conv 2-d": (nn.Conv2d(4, 6, 3, padding=1), (9, 8)),
    "conv 2-d without bias": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (9, 8)),
    "conv 2-d grouped": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), groups=2), (9, 8)),
    "conv 2-d depthwise": (nn.Conv2d(4, 8, 5, padding=2, groups=4), (9, 8)),
    "conv 2-d dilated": (nn.Conv2d(4, 6, 3, padding=(2, 3), dilation=(2, 3)), (9, 8)),
    "conv 2-d same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (9, 8)),
    "conv 2-d same, dilated, reflect": (
        nn.Conv2d(4, 6, (4, 2), padding="same", dilation=(1, 3), padding_mode="reflect"),
        (9, 8),
    ),
    "conv 2-d valid": (nn.Conv2d(4, 6, 3, padding="valid"), (9, 8)),
    "conv 2-d reflect": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (9, 8)),
    "conv 2-d replicate": (nn.Conv2d(4, 6, 3, 2, padding=1, padding_mode="replicate"), (9, 8)),
    "conv 2-d circular": (nn.Conv2d(4, 6, 3, padding=(0, 2), padding_mode="circular"), (9, 8)),
    "conv 3-d": (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), (0, 1, 1), groups=2), (4, 5, 6)),
    "transposed 1-d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (9,)),
    "transposed 1-d, stride 1, dilated": (nn.ConvTranspose1d(4, 6, 3, padding=1, output_padding=1, dilation=2), (9,)),
    "transposed 2-d": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (5, 4)),
    "transposed 2-d grouped": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), groups=2), (5, 4)),
    "transposed 2-d, stride 1": (nn.ConvTranspose2d(4, 6, 3, padding=(2, 0), groups=2, bias=False), (5, 4)),
    "transposed 2-d, stride 1 on one axis": (nn.ConvTranspose2d(4, 6, 3, stride=(1, 2)), (5, 4)),
    "transposed 3-d": (nn.ConvTranspose3d(4, 2, 2, stride=2, groups=2), (2, 3, 2)),
    "linear": (nn.Linear(4, 6), ()),
    "linear without bias": (nn.Linear(4, 6, bias=False), ()),
    "batch norm of features": (nn.BatchNorm1d(4), ()),
    "batch norm 1-d": (nn.BatchNorm1d(4), (9,)),
    "batch norm 2-d": (nn.BatchNorm2d(4, eps=1e-3), (9, 8)),
    "batch norm 2-d without affine": (nn.BatchNorm2d(4, affine=False), (9, 8)),
    "batch norm 3-d": (nn.BatchNorm3d(4), (3, 4, 5)),
    "average pool 1-d": (nn.AvgPool1d(3, 2, 1), (9,)),
    "average pool 2-d": (nn.AvgPool2d(3, 1, 1), (9, 8)),
    "average pool 2-d, uneven": (nn.AvgPool2d((2, 3), (2, 1), (0, 1)), (9, 8)),
    "average pool 2-d, own stride": (nn.AvgPool2d(2), (9, 8)),
    "average pool 2-d, divisor": (nn.AvgPool2d(3, 1, 1, divisor_override=5), (9, 8)),
    "average pool 2-d, uncounted but none": (nn.AvgPool2d(3, 1, 0, count_include_pad=False), (9, 8)),
    "average pool 3-d": (nn.AvgPool3d(2, 1, 1), (3, 4, 5)),
}


def randomise(layer, seed):
    """Fill weights and statistics with float32 values: gamma partly negative, one variance tiny."""
    draw = Draw(seed)
    for parameter in layer.parameters():
        parameter.data = draw.normal(*parameter.shape).to(parameter.dtype)
    if getattr(layer, "running_var", None) is not None:
        channels = layer.num_features
        layer.running_mean.copy_(draw.normal(channels))
        layer.running_var.copy_(draw.positive(channels))
        layer.running_var[-1] = 1e-9
        if layer.affine:
            layer.weight.data[0] = -layer.weight.data[0].abs() - 0.1
            layer.weight.data[1] = layer.weight.data[1].abs() + 0.1
    return layer.eval()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_map_of_a_layer_gives_what_the_layer_gives_in_eval_mode(kind):
    """The layer holds float32, the map float64: the oracle is the layer's own copy in float64."""
    layer, sizes = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    randomise(layer, kind)
    x = random_input(4, sizes)
    truth = copy.deepcopy(layer).double()(x).detach()
    assert_equal(layer_map(layer, dims=len(sizes), channels=4)(x), truth)


@pytest.mark.parametrize("kind", ["batch norm 2-d", "batch norm of features", "conv 2-d"])
def test_the_map_of_a_layer_in_training_mode_is_its_eval_mode(kind):
    layer, sizes = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    randomise(layer, kind)
    x = random_input(4, sizes)
    truth = copy.deepcopy(layer).double()(x).detach()
    assert_equal(layer_map(layer.train(), dims=len(sizes))(x), truth)
    assert layer.training


@pytest.mark.parametrize("kind", LAYERS)
def test_mapping_a_layer_leaves_it_as_it_was(kind):
    layer, sizes = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    randomise(layer, kind)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    map_ = layer_map(layer, dims=len(sizes), channels=4)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert not map_.weight.requires_grad


def test_a_half_precision_layer_is_widened_exactly():
    layer = randomise(nn.Conv2d(4, 6, 3), "half").bfloat16()
    map_ = layer_map(layer)
    assert map_.weight.dtype == torch.float64
    assert torch.equal(map_.weight.bfloat16(), layer.weight.detach())


REFUSED = {
    "ceil mode": (nn.AvgPool2d(3, 2, ceil_mode=True), "average pool in ceil mode: windows past the border"),
    "uncounted padding": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "leaves padding uncounted averages fewer"),
    "a norm without statistics": (
        nn.BatchNorm2d(4, track_running_stats=False),
        "batch norm without running statistics depends on the batch",
    ),
    "an activation": (nn.ReLU(), "ReLU is not an affine, shift-equivariant map"),
    "a norm over the sample": (nn.InstanceNorm2d(4, track_running_stats=True), "InstanceNorm2d is not"),
    "a norm over groups": (nn.GroupNorm(2, 4), "GroupNorm is not"),
    "a norm over channels": (nn.LayerNorm(4), "LayerNorm is not"),
    "a maximum": (nn.MaxPool2d(2), "MaxPool2d is not"),
    "an adaptive pool": (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d is not"),
    "a container": (nn.Sequential(nn.Conv2d(4, 4, 1)), "Sequential is not"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_without_a_map_is_refused_with_its_reason(kind):
    layer, reason = REFUSED[kind]
    with pytest.raises(InexactError, match=reason):
        layer_map(layer, channels=4)


@pytest.mark.parametrize("kind", ["ceil mode", "uncounted padding"])
def test_the_refused_pools_really_are_no_convolution(kind):
    """On an input of ones a zero-padded average would fall towards the border by 1/9 of what it reads outside."""
    layer = REFUSED[kind][0]
    counted = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding)
    x = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    y = layer(x)
    assert (y == 1.0).all()
    plain = counted(nn.functional.pad(x, (0, 1, 0, 1)) if kind == "ceil mode" else x)
    assert plain.shape == y.shape
    assert float(plain.min()) < 0.9


# A transposed layer of stride 1 is written as a plain convolution, which counts outputs where torch counts inputs.
COUNTED = [kind for kind in LAYERS if kind.startswith(("conv", "transposed", "linear")) and "stride 1" not in kind]


@pytest.mark.parametrize("kind", COUNTED)
def test_multiply_accumulates_are_what_torch_counts(kind):
    layer, sizes = LAYERS[kind]
    x = torch.zeros(1, 4, *sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = layer(x)
    map_ = layer_map(layer, dims=len(sizes))
    assert 2 * map_.geometry.multiply_accumulates(sizes) == counter.get_total_flops()
    assert map_.geometry.output_sizes(sizes) == tuple(y.shape[2:])
    assert map_.geometry.parameters == layer.weight.numel()
