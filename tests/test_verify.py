"""The checker is checked: wrong files must fail, and rounding must not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, fx, nn

from repconv_cli import convert, opening
from repconv_cli.checkpoint import write_safetensors
from repconv_cli.errors import InputError
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.trace import trace
from repconv_cli.options import Limits, Options
from repconv_cli.results import Result, Verification
from tests.cli.runs import INPUT, SAMPLES, FusedSample, Sample, run

Tensors = dict[str, Tensor]
aten = torch.ops.aten
FIXED = Options(input=((1, 4, 7, 8),), samples=2)


class Block(nn.Module):
    """3x3 + 1x1 + the input itself, the first two normed, as users write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv_norm = nn.BatchNorm2d(channels)
        self.point = nn.Conv2d(channels, channels, 1, bias=False)
        self.point_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv_norm(self.conv(x)) + self.point_norm(self.point(x)) + x).relu()


def make_model(seed: int = 0) -> nn.Module:
    """Three blocks and a head; statistics random, gamma partly negative, one variance tiny."""
    torch.manual_seed(seed)
    model = nn.Sequential(Block(4), Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            part.running_mean.normal_()  # type: ignore[union-attr, operator]
            part.running_var.uniform_(0.5, 2).view(-1)[0] = 1e-4  # type: ignore[union-attr, operator]
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _trace_each_module_once() -> Iterator[None]:
    """Tracing takes most of the time, and gives plain data that nothing changes."""
    traced: dict[object, Any] = {}
    kept = []

    def trace_once(module: nn.Module, args: Any, kwargs: Any, **options: Any) -> Any:
        shapes = tuple(tuple(arg.shape) for arg in args)
        if (id(module), shapes) not in traced:
            kept.append(module)
            traced[id(module), shapes] = trace(module, args, kwargs, **options)
        return traced[id(module), shapes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "trace", trace_once)
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return make_model()


@pytest.fixture(scope="module")
def good(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "model.safetensors"
    result = convert.fuse(model, out, FIXED)
    assert [block.name for block in result.blocks] == ["0", "1", "2"]
    assert [block.target for block in result.blocks] == ["0.conv.weight", "1.conv.weight", "2.conv.weight"]
    return out


def contents(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return (tensors, metadata), as the safetensors library reads them."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def judge(model: nn.Module, good: Path, tmp_path: Path) -> Callable[..., Result]:
    """Change a copy of the good file, and return what ``verify`` says of it."""

    def run_verify(change: Callable[[Tensors], None], options: Options = FIXED) -> Result:
        tensors, metadata = contents(good)
        change(tensors)
        write_safetensors(tmp_path / "wrong.safetensors", tensors, metadata, force=True)
        return convert.verify(model, tmp_path / "wrong.safetensors", options)

    return run_verify


@pytest.fixture
def judge_graph(model: nn.Module, good: Path, tmp_path: Path) -> Callable[..., Result]:
    """Change the graph in a copy of the good file, its tensors left as they are."""

    def run_verify(change: Callable[[fx.Graph], None], options: Options = FIXED) -> Result:
        tensors, metadata = contents(good)
        program = from_json(metadata["repconv.graph"], tensors)
        change(program.graph)
        metadata["repconv.graph"] = to_json(replace(program, tensors=tensors))
        write_safetensors(tmp_path / "wrong.safetensors", tensors, metadata, force=True)
        return convert.verify(model, tmp_path / "wrong.safetensors", options)

    return run_verify


def verdict(result: Result) -> Verification:
    assert result.verification is not None
    return result.verification


def assert_fails(result: Result) -> Verification:
    found = verdict(result)
    assert found.verdict == "fail"
    assert not found.passed
    assert not found
    assert result.exit_code(strict=False) == 1
    return found


def test_a_graph_that_computes_the_same_in_another_way_is_judged_by_the_outputs_and_said_so(
    judge_graph: Callable[..., Result],
) -> None:
    def twice(graph: fx.Graph) -> None:
        relu = next(node for node in graph.nodes if node.target is torch.ops.aten.relu.default)
        with graph.inserting_after(relu):
            again = graph.call_function(torch.ops.aten.relu.default, (relu,))
        relu.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)

    result = judge_graph(twice)
    found = verdict(result)
    assert (found.verdict, found.passed) == ("partial", True)
    assert found.not_checked == ("the file's graph is not that of a new plan, so it was judged by the outputs alone",)
    assert result.exit_code(strict=True) == 1


def test_an_intact_file_passes_and_each_tensor_was_compared(judge: Callable[..., Result]) -> None:
    result = judge(lambda tensors: None)
    found = verdict(result)
    assert (found.verdict, found.passed, found.first_bad_block, found.looks_like) == ("pass", True, None, None)
    assert found.tensors_checked == 8
    assert found.close is not None
    assert found.close > 0.5
    assert found.top1 == 1.0
    assert 0 < found.noise < 1e-3  # type: ignore[operator]
    assert found.max_abs <= found.limit  # type: ignore[operator]
    assert result.exit_code(strict=True) == 0


# Wrong answers, each with the first tensor's owner that is off and what the report must say of it.


def twice_the_head(tensors: Tensors) -> None:
    tensors["5.weight"] *= 2
    tensors["5.bias"] *= 2


def a_sign(tensors: Tensors) -> None:
    tensors["1.conv.weight"] *= -1
    tensors["1.conv.bias"] *= -1


def a_sign_in_one_channel(tensors: Tensors) -> None:
    tensors["1.conv.weight"][2] *= -1


def a_kernel_shifted_by_one_tap(tensors: Tensors) -> None:
    tensors["1.conv.weight"] = tensors["1.conv.weight"].roll(1, 3)


def a_kernel_mirrored(tensors: Tensors) -> None:
    tensors["1.conv.weight"] = tensors["1.conv.weight"].flip(2, 3)


def output_channels_swapped(tensors: Tensors) -> None:
    for key in ("1.conv.weight", "1.conv.bias"):
        tensors[key] = tensors[key][[1, 0, 2, 3]]


def input_channels_swapped(tensors: Tensors) -> None:
    tensors["1.conv.weight"] = tensors["1.conv.weight"][:, [1, 0, 2, 3]]


def one_wrong_output_channel(tensors: Tensors) -> None:
    tensors["1.conv.weight"][3] = tensors["1.conv.weight"][3].flip(2)


def one_weight_off_by_a_thousandth(tensors: Tensors) -> None:
    index = tensors["2.conv.weight"].abs().argmax()
    tensors["2.conv.weight"].view(-1)[index] *= 1.001


def not_a_number(tensors: Tensors) -> None:
    tensors["1.conv.weight"][0, 0, 0, 0] = float("nan")


def a_lost_identity(tensors: Tensors) -> None:
    for channel in range(4):
        tensors["1.conv.weight"][channel, channel, 1, 1] -= 1


def a_lost_shift(tensors: Tensors) -> None:
    tensors["0.conv.bias"].zero_()


WRONG = {
    twice_the_head: ("5.weight", "5.weight is 2 times what it should be"),
    a_sign: ("1", "1.conv.weight is -1 times what it should be"),
    a_sign_in_one_channel: ("1", "1 of 4 output channels of 1.conv.weight differ"),
    a_kernel_shifted_by_one_tap: ("1", "4 of 4 output channels of 1.conv.weight differ"),
    a_kernel_mirrored: ("1", "4 of 4 output channels of 1.conv.weight differ"),
    output_channels_swapped: ("1", "output channels of 1.conv.weight are in another order"),
    input_channels_swapped: ("1", "4 of 4 output channels of 1.conv.weight differ"),
    one_wrong_output_channel: ("1", "1 of 4 output channels of 1.conv.weight differ"),
    one_weight_off_by_a_thousandth: ("2", "1 of 4 output channels of 2.conv.weight differ"),
    a_lost_identity: ("1", "the identity branch was left out of 1"),
    a_lost_shift: ("0", "0.conv.bias is 0 times what it should be"),
}


@pytest.mark.parametrize(
    ("change", "block", "looks"), [(c, *told) for c, told in WRONG.items()], ids=[c.__name__ for c in WRONG]
)
def test_a_wrong_file_fails_and_says_where_and_how(
    judge: Callable[..., Result], change: Callable[[Tensors], None], block: str, looks: str
) -> None:
    found = assert_fails(judge(change))
    assert found.first_bad_block == block
    assert found.looks_like == looks


def test_a_file_with_nan_is_not_read(judge: Callable[..., Result]) -> None:
    with pytest.raises(InputError, match=r"1\.conv\.weight.*(NaN|not finite)"):
        judge(not_a_number)


def test_nan_that_appears_while_running_fails(judge_graph: Callable[..., Result]) -> None:
    def root_of_negatives(graph: fx.Graph) -> None:
        insert_after(graph, "5.weight", lambda g, y: g.call_function(aten.sqrt.default, (y,)))

    found = assert_fails(judge_graph(root_of_negatives))
    assert found.max_abs == float("inf")


def node_that_reads(graph: fx.Graph, key: str) -> fx.Node:
    (reader,) = [n for n in graph.nodes if any(s.op == "get_attr" and s.target == key for s in n.all_input_nodes)]
    return reader


def insert_after(graph: fx.Graph, key: str, make: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    reader = node_that_reads(graph, key)
    with graph.inserting_after(reader):
        marker = graph.call_function(aten.alias.default, (reader,))
    with graph.inserting_before(marker):
        made = make(graph, reader)
    reader.replace_all_uses_with(made, lambda user: user not in (made, marker))
    graph.erase_node(marker)


def one_border_row_replicated(graph: fx.Graph) -> None:
    """Let the middle block see its first row twice where it should see zeros: only its first output row is wrong."""
    conv = node_that_reads(graph, "1.conv.weight")
    names = [argument.name for argument in conv.target._schema.arguments]  # type: ignore[union-attr]
    args = [*conv.args, *([None] * (len(names) - len(conv.args)))]
    assert list(args[names.index("padding")]) == [1, 1]  # type: ignore[arg-type]
    with graph.inserting_before(conv):
        top = graph.call_function(aten.pad.default, (conv.args[0], [0, 0, 1, 0], "replicate"))
        both = graph.call_function(aten.pad.default, (top, [1, 1, 0, 1]))
        valid = graph.call_function(aten.conv2d.default, (both, *conv.args[1:3]))
    conv.replace_all_uses_with(valid)
    graph.erase_node(conv)


def test_one_wrong_border_row_fails(judge_graph: Callable[..., Result]) -> None:
    found = assert_fails(judge_graph(one_border_row_replicated))
    assert found.max_abs > found.limit  # type: ignore[operator]


def test_one_wrong_border_row_is_laid_on_its_block(judge_graph: Callable[..., Result]) -> None:
    assert verdict(judge_graph(one_border_row_replicated)).first_bad_block == "1"


def test_a_wrong_channel_of_tiny_scale_fails_although_no_output_shows_it(tmp_path: Path) -> None:
    model = make_model(1)
    with torch.no_grad():
        for name in ("conv_norm", "point_norm"):
            norm = model[1].get_submodule(name)  # type: ignore[index]
            norm.weight[2], norm.bias[2] = 1e-9, 0.0
        model[2].conv.weight[:, 2], model[2].point.weight[:, 2] = 0.0, 0.0  # type: ignore[index]
    # Without the identity this channel is nine orders of magnitude below its neighbours.
    model[1].forward = lambda x, b=model[1]: (b.conv_norm(b.conv(x)) + b.point_norm(b.point(x))).relu()  # type: ignore[index, misc]
    out = tmp_path / "model.safetensors"
    convert.fuse(model, out, FIXED)
    tensors, metadata = contents(out)
    assert 0 < tensors["1.conv.weight"][2].abs().max() < 1e-7 * tensors["1.conv.weight"].abs().max()
    tensors["1.conv.weight"][2] *= -1
    write_safetensors(out, tensors, metadata, force=True)
    found = assert_fails(convert.verify(model, out, FIXED))
    assert found.first_bad_block == "1"
    assert found.looks_like == "1 of 4 output channels of 1.conv.weight differ"


@pytest.fixture(scope="module")
def other_eps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = make_model()
    for part in other.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
    out = tmp_path_factory.mktemp("eps") / "other.safetensors"
    convert.fuse(other, out, FIXED)
    return out


def test_a_file_made_with_another_norm_eps_fails_and_says_so(model: nn.Module, other_eps: Path) -> None:
    found = assert_fails(convert.verify(model, other_eps, FIXED))
    assert found.first_bad_block == "0"
    assert found.looks_like is not None
    assert "every block differs" in found.looks_like
    assert "eps" in found.looks_like


def test_a_file_of_other_weights_fails(good: Path) -> None:
    assert "other weights" in str(assert_fails(convert.verify(make_model(5), good, FIXED)).looks_like)


def test_a_change_of_one_ulp_in_every_weight_is_rounding(judge: Callable[..., Result]) -> None:
    def nudge(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for key, tensor in tensors.items():
            up = torch.rand(tensor.shape, generator=generator) < 0.5
            tensors[key] = torch.nextafter(tensor, torch.where(up, torch.inf, -torch.inf))
            assert not torch.equal(tensors[key], tensor)

    found = verdict(judge(nudge))
    assert found.verdict == "pass"
    assert 0 < found.ratio < 10  # type: ignore[operator]


def test_a_difference_is_measured_in_the_originals_own_rounding(model: nn.Module, good: Path) -> None:
    found = verdict(convert.verify(model, good, FIXED))
    x = torch.randn((2, 4, 7, 8), generator=torch.Generator().manual_seed(0))
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        expected, exact = model(x), double(x.double())
    first = found.per_sample[0]
    assert first["noise"] == pytest.approx(float((expected - exact).abs().max()), rel=1e-6)
    assert found.noise == pytest.approx(max(sample["noise"] for sample in found.per_sample))


def test_the_noise_of_a_sample_is_its_own(model: nn.Module, good: Path) -> None:
    by_seed = [
        verdict(convert.verify(model, good, replace(FIXED, samples=1, seed=seed))).per_sample[0]["noise"]
        for seed in (0, 1, 2)
    ]
    together = verdict(convert.verify(model, good, replace(FIXED, samples=3)))
    assert [sample["noise"] for sample in together.per_sample] == by_seed


def slightly_more(graph: fx.Graph) -> None:
    insert_after(graph, "5.weight", lambda g, y: g.call_function(aten.mul.Tensor, (y, 1.001)))


@pytest.mark.parametrize(
    ("limits", "passes"),
    [
        (Limits(), False),
        (Limits(max_ratio=1e9), False),
        (Limits(rtol=2e-3, atol=0.0), True),
        (Limits(rtol=2e-3), True),
        (Limits(rtol=1e-4, atol=0.0), False),
        (Limits(atol=100.0), True),
        (Limits(atol=1e-9), False),
    ],
)
def test_the_limits_on_outputs_are_the_users(judge_graph: Callable[..., Result], limits: Limits, passes: bool) -> None:
    # A thousandth is past the float32 cap, which a ratio cannot lift.
    result = judge_graph(slightly_more, replace(FIXED, samples=1, limits=limits))
    assert verdict(result).passed is passes


def test_a_strict_ratio_fails_even_a_good_file(model: nn.Module, good: Path) -> None:
    assert_fails(convert.verify(model, good, replace(FIXED, limits=Limits(max_ratio=0.0))))


def test_a_file_without_our_graph_cannot_be_judged(model: nn.Module, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "plain.safetensors", {"weight": torch.ones(2)}, {}, force=False)
    with pytest.raises(InputError, match=r"plain\.safetensors.*no graph"):
        convert.verify(model, tmp_path / "plain.safetensors", FIXED)


def test_a_file_with_other_inputs_cannot_be_judged(good: Path) -> None:
    with pytest.raises(InputError, match=r"its inputs? (is|are)"):
        convert.verify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), good, Options(input=((2, 4),)))


def test_the_command_exits_1_and_shows_the_failure(fused: Callable[[Sample], FusedSample], tmp_path: Path) -> None:
    sample = SAMPLES["grouped_digits.pt"]
    tensors, metadata = contents(fused(sample).path)
    key = fused(sample).report["blocks"][2]["target"]
    tensors[key][5] *= -1
    wrong = tmp_path / "wrong.safetensors"
    write_safetensors(wrong, tensors, metadata, force=False)
    done = run("verify", *sample.arguments, wrong)
    assert done.exit_code == 1
    assert "FAIL" in done.stdout
    assert f"1 of 32 output channels of {key} differ" in done.stdout
    as_json = run("verify", sample.path, wrong, *INPUT, "--json", "--quiet")
    assert as_json.exit_code == 1
    found = json.loads(as_json.stdout)["verification"]
    assert (found["verdict"], found["passed"]) == ("fail", False)
    assert found["first_bad_block"] == fused(sample).report["blocks"][2]["name"]


def test_a_file_of_another_model_is_told_by_its_shapes(tmp_path: Path) -> None:
    grey, colour = (nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)).eval() for channels in (1, 3))
    convert.fuse(colour, tmp_path / "out.safetensors", Options(input=((1, 3, 8, 8),)))
    with pytest.raises(InputError, match=r"its input is \?×3×\?×\? of float32, and it is compared on 2×1×8×8\. Was it"):
        convert.verify(grey, tmp_path / "out.safetensors", Options(input=((1, 1, 8, 8),)))


class Overflowing(nn.Module):
    """A convolution whose values are beyond float32, and a norm that makes them small again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)
        nn.init.constant_(self.conv.weight[0], 3e38)
        nn.init.constant_(self.norm.weight[0], 1e-38)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_where_the_original_overflows_float64_tells_what_is_right(tmp_path: Path) -> None:
    with torch.no_grad():
        model = Overflowing().eval()
    found = convert.fuse(model, tmp_path / "out.safetensors", Options(input=((2, 2, 4, 4),)))
    assert found.verification is not None
    assert found.verification.verdict == "pass"
    (told,) = found.verification.assumptions
    assert "overflow in the original, not in float64" in told


def test_a_wrong_answer_fails_also_where_the_original_overflows(tmp_path: Path) -> None:
    with torch.no_grad():
        model = Overflowing().eval()
    path, options = tmp_path / "out.safetensors", Options(input=((2, 2, 4, 4),))
    convert.fuse(model, path, options)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    tensors["conv.weight"][0] *= 1.01
    write_safetensors(path, tensors, notes, force=True)
    found = convert.verify(model, path, options)
    assert found.verification is not None
    assert found.verification.verdict == "fail"


class OverflowingBoth(nn.Module):
    """Two branches that are beyond float32 with opposite signs: no number in float32, where their sum is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Conv2d(2, 3, 1, bias=False) for _ in range(2))
        nn.init.constant_(self.one.weight[0], 3e38)
        nn.init.constant_(self.other.weight[0], -1e38)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


def test_what_overflows_in_both_in_another_way_is_told_by_float64(tmp_path: Path) -> None:
    with torch.no_grad():
        model = OverflowingBoth().eval()
        x = 4 * torch.ones(1, 2, 1, 1)
        assert model(x)[0, 0].isnan()
    path = tmp_path / "out.safetensors"
    found = convert.fuse(model, path, Options(input=((2, 2, 4, 4),)))
    assert found.verification is not None
    assert found.verification.verdict == "pass"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        notes = file.metadata()
    (key,) = (key for key in tensors if key.endswith("weight"))
    tensors[key][0] *= -1.0
    write_safetensors(path, tensors, notes, force=True)
    wrong = convert.verify(model, path, Options(input=((2, 2, 4, 4),)))
    assert wrong.verification is not None
    assert wrong.verification.verdict == "fail"
