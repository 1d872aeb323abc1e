"""Random nets, fused or refused, compute what the module computes; ``benchmarks/random_nets.py`` runs thousands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repconv_cli.graph.interpret import run_program
from tests.graph.nets import checking
from tests.graph.nets.checking import WrongError, check, shrunk, with_valid_sizes
from tests.graph.nets.drawing import draw_net
from tests.graph.nets.full import draw_full_net
from tests.graph.nets.language import Layer, Net, NetModule, record
from tests.graph.proof import noise

T = TypeVar("T")


class HypothesisChance:
    """Choices that hypothesis makes, remembers and shrinks."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def choice(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))


@st.composite
def nets(draw: st.DrawFn) -> Net:
    return with_valid_sizes(draw_net(HypothesisChance(draw), draw(st.integers(0, 1000))))


_SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(_SETTINGS, max_examples=300)
@given(nets())
def test_any_net_of_linear_blocks_computes_the_same_after_fusing(net: Net) -> None:
    check(net)


@st.composite
def full_nets(draw: st.DrawFn) -> Net:
    return with_valid_sizes(draw_full_net(HypothesisChance(draw), draw(st.integers(0, 1000))))


@settings(_SETTINGS, max_examples=100)
@given(full_nets())
def test_any_net_with_a_layer_over_all_values_computes_the_same_after_fusing(net: Net) -> None:
    check(net)


@settings(_SETTINGS, max_examples=8)
@given(nets())
def test_any_net_computes_the_same_when_torch_exports_it(net: Net) -> None:
    check(net, is_exported=True)


def conv(out: int, kernel: tuple[int, ...], **options: object) -> dict[str, object]:
    """Return a convolution's options: plain, unless told otherwise."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    plain = {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1, "bias": False}
    return {"out": out, "kernel": kernel, **plain, **options}


# Shrunk from nets that once failed, each named after what was wrong.
KEPT: dict[str, Net] = {
    "borders_and_a_choice_between_two_layers": Net(
        (2, 6, 2, 3),
        (
            Layer("bordered", (0,), {"width": 1, "constant": "own", "sides": 4, "excess": 1}),
            Layer(
                "conv",
                (1,),
                {
                    "out": 6,
                    "kernel": (3, 3),
                    "padding": (0, 0),
                    "stride": (1, 1),
                    "dilation": (1, 1),
                    "groups": 1,
                    "bias": False,
                },
            ),
            Layer("swapped", (0,), {"scale": -0.5}),
            Layer("plus", (2, 3), {"sign": "+", "alpha": 1}),
        ),
        (4,),
        seed=6000217,
        is_spatial_free=True,
    ),
    "linear_on_tokens_of_a_free_batch": Net(
        (2, 4, 3),
        (
            Layer("conv", (0,), conv(4, (2,), groups=4)),
            Layer("tokens", (1,), {"out": 6, "bias": False}),
        ),
        (2,),
    ),
    "mean_over_a_free_size_is_no_kernel": Net(
        (2, 4, 3),
        (
            Layer("bordered", (0,), {"width": 1, "constant": "own", "sides": 2}),
            Layer("conv", (1,), conv(4, (1,))),
            Layer("mean", (2,), {}),
            Layer("norm", (3,), {"affine": False}),
        ),
        (4,),
        is_spatial_free=True,
    ),
    "window_counted_from_the_end_of_a_free_size": Net(
        (2, 6, 3, 3),
        (
            Layer("bordered", (0,), {"width": 1, "constant": "own", "sides": 4}),
            Layer("conv", (1,), conv(6, (1, 1))),
            Layer("window", (2,), {"dim": 2, "start": -3, "end": -1, "step": 1}),
            Layer("norm", (2,), {"affine": False}),
            Layer("window", (4,), {"dim": 2, "start": 0, "end": 2, "step": 1}),
            Layer("plus", (3, 5), {"sign": "+"}),
        ),
        (6,),
        is_spatial_free=True,
    ),
    "transposed_of_stride_1_is_more_work_as_a_plain_one": Net(
        (2, 4, 6, 10),
        (
            Layer("transposed", (0,), conv(4, (3, 3), groups=4, output_padding=(0, 0))),
            Layer("conv", (1,), conv(4, (1, 1), stride=(2, 2))),
            Layer("norm", (2,), {"affine": False}),
            Layer("conv", (0,), conv(4, (2, 2), stride=(2, 2), padding=(1, 1), groups=2, mode="zeros")),
            Layer("norm", (4,), {"affine": True}),
            Layer("plus", (3, 5), {"sign": "-"}),
        ),
        (6,),
    ),
    "sizes_that_agree_for_even_inputs_only": Net(
        (2, 2, 8),
        (
            Layer("conv", (0,), conv(2, (2,), stride=(2,))),
            Layer("conv", (0,), conv(2, (5,), stride=(2,), padding=(2,))),
            Layer("plus", (1, 2), {"sign": "+"}),
        ),
        (3,),
        is_spatial_free=True,
    ),
}


@pytest.mark.parametrize("net", KEPT.values(), ids=KEPT.keys())
def test_net_that_once_failed_computes_the_same(net: Net) -> None:
    check(net)


REP = Net(
    (2, 4, 6, 6),
    (
        Layer("conv", (0,), conv(4, (3, 3), padding=(1, 1), bias=True)),
        Layer("norm", (1,), {"affine": True}),
        Layer("conv", (0,), conv(4, (1, 1))),
        Layer("plus", (2, 3), {"sign": "-"}),
        Layer("activation", (4,), {"op": "relu"}),
        Layer("conv", (5,), conv(4, (1, 1)), like=2),
    ),
    (6, 5),
    is_spatial_free=True,
)


def test_the_recorded_graph_computes_what_the_module_computes() -> None:
    module = NetModule(REP)
    program = record(module)
    for shape in ((2, 4, 6, 6), (3, 4, 7, 9)):
        x = noise(shape)[0].double()
        expected = module.double()(x)
        found, _ = run_program(program, (x,))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_fused_net_is_counted_and_compared_at_other_sizes() -> None:
    outcome = check(REP)
    assert (outcome.convs_before, outcome.convs_after, outcome.blocks) == (3, 2, 1)
    assert outcome.shapes == 5


@pytest.mark.parametrize("defect", ["bias", "weight"])
def test_the_check_fails_for_a_fused_tensor_that_is_off(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checker that cannot fail checks nothing: one tensor of the fused program is changed by a millionth."""
    in_float64 = checking.in_float64

    def off(program: object) -> torch.nn.Module:
        module = in_float64(program)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                if name.startswith("conv0") and name.endswith(defect):
                    tensor.view(-1)[0] += 1e-6
        return module

    monkeypatch.setattr(checking, "in_float64", off)
    with pytest.raises(WrongError, match="outputs differ by"):
        check(REP)


def test_shrinking_keeps_what_fails_and_drops_the_rest() -> None:
    def fails(net: Net) -> bool:
        return any(layer.kind == "norm" for layer in net.layers)

    smallest = shrunk(REP, fails)
    assert [layer.kind for layer in smallest.layers] == ["norm"]
    assert smallest.outputs == (1,)
