"""Models that are odd, and models all the same: parts without values, parameters given out, casts, other modes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import repconv_cli
from repconv_cli.errors import InputError
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 8, 8)
Forward = Callable[[Any, Tensor], Any]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def made(forward: Forward) -> nn.Module:
    return randomised(Formula(forward, a=conv(4, 4), b=conv(4, 4, 1)))


def assert_fuses(module: nn.Module, path: Path, blocks: int) -> None:
    """Fail unless the fused file has that many blocks, and gives what ``module`` does."""
    result = repconv_cli.fuse(module, path, input=SHAPE, force=True)
    assert result.verification is not None
    assert (result.verification.verdict, len(result.blocks)) == ("pass", blocks)
    x = noise(SHAPE, seed=1)[0]
    with torch.no_grad():
        pairs = zip(pytree.tree_leaves(repconv_cli.load(path)(x)), pytree.tree_leaves(module(x)), strict=True)
        for found, expected in pairs:
            assert found.dtype == expected.dtype
            assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@torch.autocast("cpu", dtype=torch.bfloat16)
def in_half_precision(p: Any, x: Tensor) -> Tensor:
    y: Tensor = p.b(p.a(x).mul(2).relu())
    return y.float()


def a_copy_is_written(p: Any, x: Tensor) -> Tensor:
    y = p.a(x)
    z = y.to(torch.float32, copy=True)
    z.add_(1)
    return p.b(y) + z  # type: ignore[no-any-return]


ODD: list[tuple[str, Forward, int]] = [
    ("named_tuple", lambda p, x: Pair(p.a(x), p.b(p.a(x))), 1),
    ("named_tuple_inside", lambda p, x: {"pairs": [Pair(p.a(x), p.b(p.a(x)))]}, 1),
    ("a_weight_is_given_out", lambda p, x: (p.a(x).mul(2).relu(), p.a.weight), 1),
    ("no_channels_beside", lambda p, x: p.b(torch.cat([p.a(x), p.a(x)[:, 4:]], 1)), 1),
    ("no_channels_are_left", lambda p, x: p.a(x).split([4, 0], 1)[0].relu() + p.a(x)[:, :0].sum(), 1),
    ("no_rows_below", lambda p, x: torch.cat([p.a(x), p.a(x)[:, :, 8:]], 2), 1),
    ("a_cast_to_what_it_is", lambda p, x: p.b(p.a(x).float()), 1),
    ("the_type_of_another", lambda p, x: p.b(p.a(x).type_as(p.a.weight)), 1),
    ("the_device_that_it_is_on", lambda p, x: p.b(p.a(x).to("cpu")), 1),
    ("a_copy_is_written", a_copy_is_written, 1),
    ("a_rounded_weight", lambda p, x: functional.conv2d(x, p.a.weight.half().float(), padding=1).mul(2).relu(), 0),
    ("rounded_between", lambda p, x: p.b(p.a(x).half().float()), 0),
    ("a_layer_in_half", lambda p, x: functional.conv2d(x.half(), p.a.weight.half(), padding=1).float(), 0),
    ("by_its_largest_value", lambda p, x: (lambda y: y * y.max().item())(p.a(x).mul(2).relu()), 1),
    ("autocast", in_half_precision, 0),
]


@pytest.mark.parametrize(("forward", "blocks"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
def test_an_odd_model_is_fused_or_left_and_gives_the_same(forward: Forward, blocks: int, tmp_path: Path) -> None:
    assert_fuses(made(forward), tmp_path / "out.safetensors", blocks)


# What follows two layers with an activation between: the first is scaled, and so is a block.
AFTERWARDS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("clip", lambda y: y.clip(-1, 1)),
    ("nan_to_num", torch.nan_to_num),
    ("unfold_and_fold", lambda y: functional.fold(functional.unfold(y, 2, stride=2), (8, 8), 2, stride=2)),
    ("index_fill", lambda y: y.index_fill(2, torch.tensor([0, 1]), 0.5)),
    ("rot90", lambda y: torch.rot90(y, 1, (2, 3))),
    ("take_along_dim", lambda y: torch.take_along_dim(y, y.argsort(2), 2)),
    ("trilinear", lambda y: functional.interpolate(y.unsqueeze(1), scale_factor=2, mode="trilinear")),
    ("nearest_exact", lambda y: functional.interpolate(y, scale_factor=2, mode="nearest-exact")),
    ("antialiased", lambda y: functional.interpolate(y, size=(4, 4), mode="bilinear", antialias=True)),
    ("adaptive_max_pool1d", lambda y: functional.adaptive_max_pool1d(y.flatten(2), 3)),
    ("cosine_similarity", lambda y: functional.cosine_similarity(y, y.flip(2))),
    ("one_hot", lambda y: functional.one_hot(y.argmax(1), 4).float()),
    ("gru_cell", lambda y: torch.gru_cell(y[:, :, 0, 0], y[:, :, 1, 1], *[torch.full((12, 4), 0.3)] * 2)),
    ("lstm_cell", lambda y: torch.lstm_cell(y[:, :, 0, 0], [y[:, :, 1, 1]] * 2, *[torch.full((16, 4), 0.3)] * 2)[1]),
    ("affine_grid", lambda y: functional.grid_sample(y, functional.affine_grid(y[:, :2, 0, :3].tanh(), [2, 4, 9, 9]))),
    ("bilinear", lambda y: functional.bilinear(y, y.flip(3), torch.full((3, 8, 8), 0.3))),
    ("softshrink", lambda y: functional.softshrink(y, 0.2)),
    ("real_spectrum", lambda y: torch.fft.irfft2(torch.fft.rfft2(y, norm="ortho").exp(), norm="ortho")),
    ("spectrum", lambda y: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(y))).real),
    ("spectrum_by_parts", lambda y: torch.view_as_real(torch.fft.rfftn(y, dim=(2, 3))).sum(-1)),
    ("by_a_power_of_a_size", lambda y: y * y.shape[2] ** -0.5),
    ("replication_pad3d", lambda y: functional.pad(y.unsqueeze(1), (1,) * 6, mode="replicate")),
]


@pytest.mark.parametrize("after", [case[1] for case in AFTERWARDS], ids=[case[0] for case in AFTERWARDS])
def test_an_operator_that_is_no_linear_map_is_kept_and_read_back(
    after: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    assert_fuses(made(lambda p, x: after(p.b(p.a(x).mul(2).relu()))), tmp_path / "out.safetensors", 1)


def recogniser(layer: type[nn.RNNBase]) -> nn.Module:
    """Return a small model as of text recognition: the columns of an image are a sequence."""

    def forward(p: Any, x: Tensor) -> Tensor:
        columns = p.norm(p.conv(x)).relu().permute(0, 3, 1, 2).flatten(2)
        return p.head(p.recurrent(columns)[0])  # type: ignore[no-any-return]

    recurrent = layer(32, 8, 2, bidirectional=True, batch_first=True)
    parts = {"conv": conv(4, 4), "norm": nn.BatchNorm2d(4), "recurrent": recurrent, "head": nn.Linear(16, 5)}
    return randomised(Formula(forward, **parts))


def test_a_complex_number_is_no_scale(tmp_path: Path) -> None:
    module = made(lambda p, x: torch.fft.ifft2(torch.fft.fft2(p.b(p.a(x).mul(2))) * p.number).real)
    module.number = nn.Parameter(torch.tensor([0.5 + 2j]))
    assert_fuses(module, tmp_path / "out.safetensors", 1)


@pytest.mark.parametrize(("body", "head"), [("float16", "float32"), ("float32", "float64"), ("float64", "float32")])
def test_a_block_is_stored_in_its_own_type(body: str, head: str, tmp_path: Path) -> None:
    """The types of the body, which has more weights, and of a block behind it."""
    first, last = getattr(torch, body), getattr(torch, head)

    def forward(p: Any, x: Tensor) -> Tensor:
        return p.norm(p.head(p.body(x.to(first)).relu().to(last))).float()  # type: ignore[no-any-return]

    module = randomised(Formula(forward, body=conv(4, 32), head=conv(32, 4), norm=nn.BatchNorm2d(4)))
    module.body.to(first)
    module.head.to(last)
    module.norm.to(last)
    if body == "float16":
        with torch.no_grad():
            module.head.weight.mul_(1e-2)
    out = tmp_path / "out.safetensors"
    result = repconv_cli.fuse(module, out, input=SHAPE)
    assert result.verification is not None
    assert (result.verification.verdict, len(result.blocks)) == ("pass", 1)
    stored = repconv_cli.load(out).state_dict()
    assert {tensor.dtype for tensor in stored.values()} == {first, last}
    assert stored["head.weight"].dtype == last


def test_a_norm_whose_channels_are_pooled_stays_before_the_pool(tmp_path: Path) -> None:
    for pool, shape in ((nn.AdaptiveAvgPool1d(1), (4, 8)), (nn.AdaptiveAvgPool2d(1), (4, 8, 10))):
        module = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), pool)).eval()
        result = repconv_cli.fuse(module, tmp_path / "out.safetensors", input=shape, force=True)
        assert result.verification is not None
        assert result.verification.verdict == "pass"
        x = noise(shape)[0]
        with torch.no_grad():
            torch.testing.assert_close(repconv_cli.load(tmp_path / "out.safetensors")(x), module(x))


@pytest.mark.parametrize("slope", [-0.2, 0.0, 0.1])
def test_a_loaded_model_with_any_slope_can_be_trained(slope: float, tmp_path: Path) -> None:
    module = made(lambda p, x: functional.leaky_relu(p.a(x), slope))
    repconv_cli.fuse(module, tmp_path / "out.safetensors", input=SHAPE)
    for net, x in ((repconv_cli.load(tmp_path / "out.safetensors"), noise(SHAPE)[0]), (module, noise(SHAPE)[0])):
        x.requires_grad_()
        net(x).square().sum().backward()
        assert x.grad is not None
        if net is not module:
            found = x.grad
    torch.testing.assert_close(found, x.grad)


def test_a_mask_of_minus_infinity_is_written_and_read_back(tmp_path: Path) -> None:
    def causal(p: Any, x: Tensor, mask: Tensor) -> Tensor:
        rows = p.b(p.a(x).mul(2).relu()).flatten(1, 2)
        y: Tensor = (rows @ rows.mT * 0.1 + mask).softmax(-1) @ rows
        return y

    def forward(p: Any, x: Tensor) -> Tensor:
        return causal(p, x, torch.full((32, 32), float("-inf")).triu(1))

    assert_fuses(made(forward), tmp_path / "made.safetensors", 1)
    module = made(lambda p, x: causal(p, x, p.mask))
    module.register_buffer("mask", torch.full((32, 32), float("-inf")).triu(1))
    assert_fuses(module, tmp_path / "held.safetensors", 1)


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_behind_convolutions(layer: type[nn.RNNBase], tmp_path: Path) -> None:
    assert_fuses(recogniser(layer), tmp_path / "out.safetensors", 1)


def test_a_container_that_no_file_holds_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives a deque"):
        repconv_cli.fuse(made(lambda p, x: deque([p.a(x)])), tmp_path / "out.safetensors", input=SHAPE)
    assert not list(tmp_path.iterdir())


def test_a_module_without_modes_is_as_good_as_any(tmp_path: Path) -> None:
    module = made(lambda p, x: p.b(p.a(x)))

    class OneMode(Formula):
        def train(self) -> None:  # type: ignore[override]
            raise AssertionError("nobody asked for it")

    exported = torch.export.export(module, noise(SHAPE)).module()
    own = OneMode(lambda p, x: p.b(p.a(x)), a=conv(4, 4), b=conv(4, 4, 1))
    for source in (exported, own):
        assert_fuses(source, tmp_path / "out.safetensors", 1)
