"""The verdict on outputs: it does not depend on how a batch is cut, and wrong ones are caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from repconv_cli.options import Limits
from repconv_cli.results import Verification
from repconv_cli.verdict import Outputs, judge

BATCH = 8
LIMITS = [Limits(), Limits(max_ratio=1.0), Limits(atol=1e-6), Limits(rtol=1e-7), Limits(atol=1e-3, rtol=1e-3)]


def rounded(exact: Tensor, ulps: float, generator: torch.Generator) -> Tensor:
    """Return ``exact`` in float32 with rounding of about so many ulps of each sample's own range."""
    scale = exact.abs().amax(1, keepdim=True) * ulps * torch.finfo(torch.float32).eps
    return (exact + scale * torch.randn(exact.shape, generator=generator, dtype=torch.float64)).float()


def make_outputs(seed: int, spread: float = 0.0, ulps: float = 8.0) -> Outputs:
    """Return a batch whose samples are of ranges that differ by ``spread`` powers of ten, with rounding in each."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(BATCH, 10, generator=generator, dtype=torch.float64)
    exact *= 10 ** torch.linspace(-spread, 0, BATCH, dtype=torch.float64)[:, None]
    return Outputs([rounded(exact, ulps, generator)], [rounded(exact, ulps, generator)], [exact], [exact * (1 + 1e-15)])


def cut(outputs: Outputs, size: int) -> list[Outputs]:
    """Return the batch in samples of ``size``."""
    parts = [side[0].split(size) for side in (outputs.expected, outputs.found, outputs.exact, outputs.exact_fused)]
    return [Outputs(*([side] for side in sides)) for sides in zip(*parts, strict=True)]


def judged(runs: list[Outputs], limits: Limits | None = None) -> Verification:
    return judge(iter(runs), limits or Limits())


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_verdict_does_not_depend_on_how_a_batch_is_cut(limits: Limits, spread: float) -> None:
    for seed in range(20):
        outputs = make_outputs(seed, spread)
        whole = judged([outputs], limits)
        for size in (1, 2, 4):
            found = judged(cut(outputs, size), limits)
            for name in ("verdict", "close", "max_abs", "max_rel", "noise", "ratio", "limit", "top1", "float64"):
                assert getattr(found, name) == getattr(whole, name), (name, size)


def test_a_sample_where_large_values_cancel_is_judged_by_the_noise_of_all() -> None:
    """One of four samples has a small output by chance, and the rounding of the large ones that it is made of."""
    exact = torch.tensor([[3.8], [0.4], [7.6], [0.09]], dtype=torch.float64) @ torch.ones(1, 10, dtype=torch.float64)
    noise = torch.tensor([[0.8], [1.1], [8.4], [0.04]], dtype=torch.float64) * 4e-7
    wrong = torch.tensor([[2.4], [0.1], [4.6], [1.2]], dtype=torch.float64) * 4e-7
    outputs = Outputs([(exact + noise).float()], [(exact + noise + wrong).float()], [exact], [exact])
    assert judged(cut(outputs, 1)).verdict == "pass"


@pytest.mark.parametrize("sample", range(4))
@pytest.mark.parametrize("output", range(2))
def test_one_value_of_one_sample_of_one_output_is_enough_to_fail(sample: int, output: int) -> None:
    runs = []
    for seed in range(4):
        first, second = make_outputs(seed), make_outputs(seed + 100)
        sides = zip(
            (first.expected, first.found, first.exact, first.exact_fused),
            (second.expected, second.found, second.exact, second.exact_fused),
            strict=True,
        )
        # The outputs differ in range by a million: each is judged by its own.
        runs.append(Outputs(*([a[0], b[0] * 1e6] for a, b in sides)))
    assert judged(runs).verdict == "pass"
    noise = max(float((run.expected[output].double() - run.exact[output]).abs().max()) for run in runs)
    runs[sample].found[output][3, 5] += 12 * noise
    assert judged(runs).verdict == "fail"


def test_rounding_is_no_explanation_beyond_the_cap() -> None:
    outputs = make_outputs(0, ulps=1e5)
    found = judged([outputs])
    assert found.ratio is not None
    assert found.ratio < 10
    assert found.verdict == "fail"
    assert found.looks_like is not None
    assert found.looks_like.startswith(
        f"rounding, which alone moves the original's own outputs by {found.noise:.1e} on"
    )
    assert "--inputs" in found.looks_like


def test_what_rounding_does_not_explain_is_not_called_rounding() -> None:
    outputs = make_outputs(0, ulps=1e5)
    outputs.found[0].mul_(-1)
    assert (judged([outputs]).verdict, judged([outputs]).looks_like) == ("fail", None)
    noisy = make_outputs(1, ulps=1e5)
    both = Outputs(
        outputs.expected + noisy.expected,
        outputs.found + noisy.found,
        outputs.exact + noisy.exact,
        outputs.exact_fused + noisy.exact_fused,
    )
    assert (judged([both]).verdict, judged([both]).looks_like) == ("fail", None)


def test_other_outputs_fail_whatever_the_limits() -> None:
    good = make_outputs(0)
    for found in ([], [good.found[0][:, :5]], [torch.full_like(good.found[0], torch.nan)]):
        for limits in (Limits(), Limits(atol=1e9)):
            verdict = judged([good, Outputs(good.expected, found, good.exact, good.exact_fused)], limits)
            assert verdict.verdict == "fail"
            assert verdict.max_abs == float("inf")
            assert verdict.ratio == float("inf")
