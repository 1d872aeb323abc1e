"""The checker is checked: every wrong answer must be refused, and the right one accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.errors import InputError, UnprovenError
from repconv_cli.graph import certificate
from repconv_cli.graph.certificate import LIMIT, certify
from repconv_cli.graph.fuse import fuse_program
from repconv_cli.graph.plan import Plan, make_plan
from repconv_cli.graph.rewrite import Fusion, fuse_block
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs
from tests.graph.models import Formula, MobileOne, RepVGG, conv, conv_bn, randomised
from tests.graph.proof import in_float64, noise

DIFFERS = r"one operator differs from its branches by (inf|nan|\d\.\de[+-]\d+) of scale"
Pair = tuple[Plan, Fusion]


def planned(module: nn.Module, shape: tuple[int, ...] = (2, 4, 7, 7), *, is_fixed: bool = False) -> Pair:
    may_vary = ((True, *(False,) * (len(shape) - 1)),) if is_fixed else None
    plan = make_plan(trace(module, noise(shape), may_vary=may_vary))
    assert len(plan.blocks) == 1
    return plan, fuse_block(plan.blocks[0])


@pytest.fixture(scope="module", params=[False, True], ids=["free sizes", "fixed sizes"])
def repvgg(request: pytest.FixtureRequest) -> Pair:
    return planned(randomised(RepVGG()), (2, 4, 21, 24), is_fixed=request.param)


@pytest.fixture(scope="module")
def badly_scaled() -> Pair:
    """Channel 1 is of scale 1e-6 beside channel 0 of scale 1e7."""
    module = randomised(RepVGG())
    with torch.no_grad():
        for norm in (module.dense[1], module.pointwise[1], module.identity):
            for values in (norm.weight, norm.bias):
                values[0] *= 1e7
                values[1] *= 1e-6
    return planned(module)


@pytest.fixture(scope="module")
def grouped() -> Pair:
    return planned(randomised(RepVGG(groups=2)))


def corrupted(fusion: Fusion, kind: str, change: Callable[[Tensor], Tensor]) -> Fusion:
    """Return ``fusion`` with its ``kind`` (weight or bias) changed; the original is left alone."""
    tensors = {key: t.clone() for key, t in fusion.tensors().items()}
    (key,) = (key for key in tensors if key.endswith(kind))
    tensors[key] = change(tensors[key])
    assert not torch.equal(tensors[key], fusion.tensors()[key])
    return replace(fusion, compute=lambda: tuple(tensors.values()))


def assert_refused(pair: Pair, wrong: Fusion) -> None:
    plan, right = pair
    assert certify(right, plan.analysis.constants).error <= LIMIT
    with pytest.raises(UnprovenError, match=DIFFERS):
        certify(wrong, plan.analysis.constants)


def _set(index: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def changed(values: Tensor) -> Tensor:
        values[index] = change(values[index])
        return values

    return changed


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "twice the weight": ("weight", lambda w: 2 * w),
    "twice the bias": ("bias", lambda b: 2 * b),
    "one sign": ("weight", _set((2, 1, 0, 2), torch.neg)),
    "the sign of a channel": ("weight", _set((3,), torch.neg)),
    "a kernel shifted down": ("weight", lambda w: w.roll(1, 2)),
    "a kernel shifted right": ("weight", lambda w: w.roll(1, 3)),
    "a flipped kernel": ("weight", lambda w: w.flip(2)),
    "a transposed kernel": ("weight", lambda w: w.transpose(2, 3)),
    "output channels swapped": ("weight", lambda w: w[[1, 0, 2, 3]]),
    "input channels swapped": ("weight", lambda w: w[:, [1, 0, 2, 3]]),
    "biases swapped": ("bias", lambda b: b[[1, 0, 2, 3]]),
    "no bias": ("bias", torch.zeros_like),
    "one bias off by 1e-9 of itself": ("bias", _set((2,), lambda b: b * (1 + 1e-9))),
    "one weight off by 1e-9 of itself": ("weight", _set((2, 2, 1, 1), lambda w: w * (1 + 1e-9))),
    "rounded to float32": ("weight", lambda w: w.float().double()),
    "NaN in one weight": ("weight", _set((1, 1, 1, 1), lambda w: w * torch.nan)),
    "infinity in one bias": ("bias", _set((0,), lambda b: b * torch.inf)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_refused(repvgg: Pair, name: str) -> None:
    assert_refused(repvgg, corrupted(repvgg[1], *WRONG[name]))


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_sign_in_a_channel_of_scale_1e_6_beside_one_of_1e7_is_refused(badly_scaled: Pair, kind: str) -> None:
    assert_refused(badly_scaled, corrupted(badly_scaled[1], kind, _set((1,), torch.neg)))


def test_a_small_error_in_a_small_channel_is_refused(badly_scaled: Pair) -> None:
    assert_refused(badly_scaled, corrupted(badly_scaled[1], "weight", _set((1, 3, 0, 0), lambda w: w * (1 + 1e-8))))


def test_a_dropped_identity_is_refused(repvgg: Pair) -> None:
    whole = randomised(RepVGG())
    plain = Formula(lambda p, x: p.a(x) + p.b(x), a=whole.dense, b=whole.pointwise).eval()
    without = planned(plain)[1]
    weight = next(t for key, t in without.tensors().items() if key.endswith("weight"))
    assert_refused(repvgg, corrupted(repvgg[1], "weight", lambda _: weight))


def test_an_identity_that_does_not_wrap_per_group_is_refused(grouped: Pair) -> None:
    """As in YOLOv7's converter: the one of output channel o sits at input o, not at o modulo the group's width."""
    module = randomised(RepVGG(groups=2))
    scale = module.identity.weight / torch.sqrt(module.identity.running_var + module.identity.eps)

    def unwrapped(weight: Tensor) -> Tensor:
        for output in (2, 3):
            weight[output, output % 2, 1, 1] -= scale[output].detach().double()
        return weight

    assert_refused(grouped, corrupted(grouped[1], "weight", unwrapped))


def test_a_wrong_eps_is_refused(repvgg: Pair) -> None:
    module = randomised(RepVGG())
    module.dense[1].eps = 1e-3
    other = planned(module)[1]
    assert_refused(repvgg, replace(repvgg[1], compute=other.compute))


def test_the_right_kernel_with_the_wrong_border_is_refused() -> None:
    """The same kernel and bias, zeros read past the border instead of reflections: only the border can tell."""
    reflected = planned(randomised(nn.Sequential(conv_bn(4, 4, 1), conv(4, 4, 3, padding_mode="reflect"))))
    plain = planned(randomised(nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4))))[1]
    assert_refused(reflected, replace(plain, block=reflected[1].block, compute=reflected[1].compute))


def test_one_wrong_border_row_is_refused(repvgg: Pair) -> None:
    """The operator is right but for the last row of its output."""
    right = repvgg[1]

    def emit(graph, x):
        y = right.emit(graph, x)
        last = graph.call_function(torch.ops.aten.slice.Tensor, (y, 2, -1, 2**63 - 1))
        first = graph.call_function(torch.ops.aten.slice.Tensor, (y, 2, 0, -1))
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (last, 2.0))
        return graph.call_function(torch.ops.aten.cat.default, ([first, doubled], 2))

    assert_refused(repvgg, replace(right, emit=emit))


def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the list that the shapes of all proofs from now on are added to."""
    found: list[tuple[int, ...]] = []
    run = certificate._run

    def seen(region, x, *others):
        found.append(tuple(x.shape))
        return run(region, x, *others)

    monkeypatch.setattr(certificate, "_run", seen)
    return found


@pytest.mark.parametrize("size", range(20, 24))
def test_a_fixed_size_is_proved_at_a_small_one_with_its_remainder(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At stride 2 the last window of an even size does not reach the padding behind the image; that of an odd does."""
    module = randomised(nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)))
    plan, right = planned(module, (2, 4, size, 7), is_fixed=True)

    def emit(graph, x):
        padded = graph.call_function(torch.ops.aten.constant_pad_nd.default, (x, [1, 1, 1, 0]))
        y = right.emit(graph, padded)
        (layer,) = (node for node in graph.nodes if node.target is torch.ops.aten.conv2d.default)
        assert layer.args[4] == [1, 1]
        layer.args = (*layer.args[:4], [0, 0], *layer.args[5:])
        return y

    found = places(monkeypatch)
    if size % 2:
        assert_refused((plan, right), replace(right, emit=emit))
    else:
        assert certify(replace(right, emit=emit), plan.analysis.constants).is_proof
    ((_, _, height, width),) = set(found)
    assert height < 8
    assert height % 2 == size % 2
    assert width == 5


@pytest.mark.parametrize("is_fixed", [True, False])
def test_what_is_cropped_first_is_proved_at_more_than_one_window(
    is_fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"conv": conv(4, 4, 3, padding=0), "norm": nn.BatchNorm2d(4)}
    cropped = Formula(lambda part, x: part.norm(torch.nn.functional.pad(part.conv(x), [-6, -5, -4, -7])), **parts)
    plan, right = planned(randomised(cropped), (2, 4, 30, 30), is_fixed=is_fixed)
    found = places(monkeypatch)
    assert certify(right, plan.analysis.constants).is_proof
    for _, _, height, width in found:
        assert 11 + 3 + 1 <= height < 20
        assert 11 + 3 + 1 <= width < 20


def test_what_knows_a_place_by_its_number_is_proved_at_the_size_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of twelve rows are kept: at a small size that is all of them, on either side of the proof."""
    parts = {"conv": conv(4, 4, 3), "norm": nn.BatchNorm2d(4)}
    cropped = Formula(lambda part, x: part.norm(part.conv(x)[:, :, :10]), **parts)
    plan, right = planned(randomised(cropped), (2, 4, 12, 12), is_fixed=True)
    whole = planned(
        randomised(Formula(lambda part, x: part.norm(part.conv(x)), **parts)), (2, 4, 12, 12), is_fixed=True
    )
    found = places(monkeypatch)
    assert_refused((plan, right), replace(right, emit=whole[1].emit))

    def emit(graph, x):
        return graph.call_function(torch.ops.aten.slice.Tensor, (whole[1].emit(graph, x), 2, 0, 10))

    assert_refused(whole, replace(whole[1], emit=emit))
    # Each time the right one first: of the plain convolution alone a small place is enough.
    assert [shape[2] for shape in found] == [12, 12, 4, 12]


def test_an_output_of_another_size_is_refused(repvgg: Pair) -> None:
    plan, right = repvgg

    def emit(graph, x):
        return graph.call_function(torch.ops.aten.slice.Tensor, (right.emit(graph, x), 2, 0, -1))

    with pytest.raises((UnprovenError, RuntimeError), match=r"differs from its branches|must match the size"):
        certify(replace(right, emit=emit), plan.analysis.constants)


def test_the_wrong_dilation_or_stride_of_a_depthwise_block_is_refused() -> None:
    pair = planned(randomised(MobileOne(groups=4)))
    other = planned(randomised(MobileOne(groups=4, stride=2)))[1]
    with pytest.raises((UnprovenError, RuntimeError), match=r"differs from its branches|must match the size"):
        certify(replace(other, block=pair[1].block), pair[0].analysis.constants)


@pytest.mark.parametrize(
    "formula",
    [lambda _, x: (x - 0.485) / 0.229, lambda _, x: (x + -0.485) / 0.229, lambda _, x: (0.485 - x) / -0.229],
    ids=["subtracted", "a negative number added", "subtracted from"],
)
def test_a_constant_beside_values_of_its_own_size_raises_no_false_alarm(formula: Callable[..., Tensor]) -> None:
    """|x| - 0.485 is near zero for some x: the scale there is |x| + 0.485, whatever the sign is written on."""
    module = Formula(lambda part, x: formula(part, x).reshape(x.shape[0], 3 * 96 * 96)).eval()
    plan, fusion = planned(module, (2, 3, 96, 96))
    assert max(certify(fusion, plan.analysis.constants, seed).error for seed in range(10)) <= 1e-14


def test_the_whole_program_is_checked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every certificate blind, the whole model's float64 run would still refuse."""
    program = trace(randomised(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv(4, 2))), noise((2, 4, 7, 7)))

    def wrong(block):
        return corrupted(fuse_block(block), "weight", lambda w: w * (1 + 1e-9))

    monkeypatch.setattr("repconv_cli.graph.fuse.fuse_block", wrong)
    monkeypatch.setattr("repconv_cli.graph.fuse.certify", lambda fusion, constants, seed, make: make())
    with pytest.raises(UnprovenError, match=r"the fused model differs from the original by \d\.\de-\d+ of its range"):
        fuse_program(program, random_inputs(program, 1, 0))


def test_a_block_that_cannot_be_proven_is_left_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = randomised(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 2)))
    program = trace(module, noise((2, 4, 7, 7)))

    def doubled_in_the_first(block):
        fusion = fuse_block(block)
        return corrupted(fusion, "weight", lambda w: w * 2) if block.name.startswith("0") else fusion

    monkeypatch.setattr("repconv_cli.graph.fuse.fuse_block", doubled_in_the_first)
    found = fuse_program(program, random_inputs(program, 1, 0))
    assert [block.name for block in found.plan.blocks] == ["2.0"]
    (refusal,) = found.plan.refusals
    assert refusal.name.startswith("0")
    assert re.search(r"could not be proven, so it was left: .* differs from its branches by", refusal.reason)
    x = noise((3, 4, 7, 7), seed=1)[0]
    with torch.no_grad():
        assert torch.allclose(in_float64(found.program)(x.double()), module.double()(x.double()), rtol=1e-12)


def test_a_block_whose_bias_the_dtype_cannot_hold_is_left_and_says_so() -> None:
    """Each tensor of the original is small; the fused bias is mean / sqrt(var), beyond float16's 65504."""
    module = randomised(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 2))).half()
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    with torch.no_grad():
        norm.running_mean[0], norm.running_var[0], norm.weight[0] = 6e3, 1e-7, 1.0  # type: ignore[index]
    program = trace(module, tuple(x.half() for x in noise((2, 4, 7, 7))))
    found = fuse_program(program, random_inputs(program, 1, 0), dtype=torch.float16)
    assert [block.name for block in found.plan.blocks] == ["2.0"]
    assert "has values that float16 cannot hold" in found.plan.refusals[0].reason
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.program.tensors.values())


def test_a_model_that_makes_much_of_the_last_bit_is_judged_by_what_it_makes_of_it() -> None:
    """A gain of forty, three times: rounding alone moves the outputs by more than 1e-11 of their range."""

    def chaotic(part, x):
        y = part.block(x)
        for _ in range(3):
            y = torch.sin(40.0 * y)
        return y

    module = randomised(Formula(chaotic, block=conv_bn(4, 4)))
    program = trace(module, noise((2, 4, 7, 7)))
    found = fuse_program(program, random_inputs(program, 1, 0))
    assert found.float64_error > 1e-11
    assert max(certificate.error for certificate in found.certificates) <= LIMIT


def _cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repconv_cli.algebra.slabs.SLAB_VALUES", 5)
    monkeypatch.setattr("repconv_cli.graph.interpret._FEWEST_ROWS", 1)


def test_a_large_layer_run_in_pieces_gives_the_same_proof(
    repvgg: Pair, grouped: Pair, badly_scaled: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for plan, fusion in (repvgg, grouped, badly_scaled):
        whole = certify(fusion, plan.analysis.constants)
        _cut_into_pieces(monkeypatch)
        pieces = certify(fusion, plan.analysis.constants)
        monkeypatch.undo()
        assert pieces.error == pytest.approx(whole.error, rel=0.5, abs=LIMIT / 100)
        wrong = corrupted(fusion, "weight", lambda weight: weight * (1 + 1e-9))
        _cut_into_pieces(monkeypatch)
        with pytest.raises(UnprovenError, match=DIFFERS):
            certify(wrong, plan.analysis.constants)
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, None])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (RepVGG(), (2, 4, 7, 7)),
        (RepVGG(groups=2), (2, 4, 7, 7)),
        (nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6)), (2, 4, 9)),
        (nn.Sequential(nn.Conv3d(4, 6, 3, stride=2), nn.BatchNorm3d(6)), (2, 4, 5, 7, 5)),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 4)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    ],
)
def test_a_kernel_made_in_pieces_has_the_same_bits(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trace(randomised(module), noise(shape))
    samples = list(random_inputs(program, 2, 0))
    whole = fuse_program(program, samples, dtype=dtype)
    _cut_into_pieces(monkeypatch)
    pieces = fuse_program(program, samples, dtype=dtype)
    assert len(whole.certificates) == 1
    assert pieces.certificates[0].error <= LIMIT
    assert whole.program.tensors.keys() == pieces.program.tensors.keys()
    for key, tensor in whole.program.tensors.items():
        assert torch.equal(tensor, pieces.program.tensors[key])
        assert tensor.dtype == pieces.program.tensors[key].dtype


def test_what_the_type_cannot_hold_is_no_block_in_pieces_either(monkeypatch: pytest.MonkeyPatch) -> None:
    module = randomised(RepVGG())
    with torch.no_grad():
        module.dense[1].weight[2] = 1e9
    program = trace(module, noise((2, 4, 7, 7)))
    _cut_into_pieces(monkeypatch)
    found = fuse_program(program, list(random_inputs(program, 1, 0)), dtype=torch.float16)
    assert any("weight has values that float16 cannot hold" in refusal.reason for refusal in found.plan.refusals)


def test_weights_that_cancel_to_nothing_are_the_files_fault_not_a_bug() -> None:
    module = randomised(nn.Sequential(RepVGG(), nn.ReLU(), conv(4, 4, 3)))
    with torch.no_grad():
        module[0].dense[1].bias[0] = 1e38
        module[0].pointwise[1].bias[0] = -1e38
    program = trace(module, noise((2, 4, 7, 7)))
    with pytest.raises(InputError, match=r"rounding in float64 alone changes its outputs by \d.\de\+\d\d of their"):
        fuse_program(program, list(random_inputs(program, 1, 0)))
