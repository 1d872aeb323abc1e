"""The verdict: outputs of the original and of the fused model compared on random inputs.

A difference means something only beside a yardstick. The original in its own dtype already differs from its own
float64 run; that is the noise floor, and the difference is judged in units of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from repconv_cli.graph.choices import count_choices, run_choosing
from repconv_cli.graph.interpret import run_program, running
from repconv_cli.graph.program import InputInfo, Program, tensors_in
from repconv_cli.graph.sizes import other_size
from repconv_cli.options import Limits
from repconv_cli.results import Verification

# Beyond this share of the range, rounding of that dtype is no explanation.
CAPS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
ULPS = 4
Model = Callable[..., Any]


@dataclass
class _Seen:
    """The largest figures of one output, over all samples as if they were one batch."""

    dtype: torch.dtype
    range: float = 0.0
    noise: float = 0.0
    difference: float = 0.0
    float64: float = 0.0

    @property
    def unit(self) -> float:
        """What one rounding is: the noise, or some ulps of the range."""
        return max(self.noise, ULPS * torch.finfo(self.dtype).eps * self.range)

    def limit(self, ratio: float) -> float:
        """Return the largest difference that rounding explains."""
        return min(ratio * self.unit, CAPS.get(self.dtype, 1e-3) * self.range)

    def is_noise(self, ratio: float) -> bool:
        """Whether rounding alone is beyond the limit, and the difference is none that it does not explain."""
        return self.limit(ratio) < self.noise and self.difference <= ratio * self.unit

    @property
    def ratio(self) -> float:
        """The difference in units of rounding."""
        return _share(self.difference, self.unit)

    def relative(self, difference: float) -> float:
        """Return a difference as a share of the range."""
        return _share(difference, self.range)

    def add(self, sample: _Seen) -> None:
        """Take in the figures of one more sample."""
        for figure in ("range", "noise", "difference", "float64"):
            setattr(self, figure, max(getattr(self, figure), getattr(sample, figure)))


@dataclass
class _Tally:
    """Figures over all samples: by output what is judged, and what is counted."""

    outputs: dict[int, _Seen] = field(default_factory=dict)
    close: int = 0
    values: int = 0
    top1_same: int = 0
    top1_all: int = 0
    allowed: float = 0.0
    overflowed: int = 0
    is_bad: bool = False


def random_inputs(program: Program, samples: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield ``samples`` tuples of normal noise (small integers for integer inputs), as the program was traced."""
    for sample in range(samples):
        generator = torch.Generator().manual_seed(seed + sample)
        yield tuple(_noise(info.example, info.dtype, generator) for info in program.inputs)


def proof_inputs(program: Program, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the whole model is proved on in float64: noise, one sample where the batch is free.

    With other free sizes there is a second input, which has them larger and smaller in turns, so far from the traced
    ones that they are others behind the strides as well: what holds at the traced sizes only is seen there.
    """
    traced = [tuple(_proof_size(info, axis) for axis in range(len(info.shape))) for info in program.inputs]
    others = [
        tuple(other_size(info, axis) if axis else size for axis, size in enumerate(shape))
        for shape, info in zip(traced, program.inputs, strict=True)
    ]
    for index, shapes in enumerate([traced, others] if others != traced else [traced]):
        generator = torch.Generator().manual_seed(seed + index)
        yield tuple(_noise(shape, info.dtype, generator) for shape, info in zip(shapes, program.inputs, strict=True))


def _proof_size(info: InputInfo, axis: int) -> int:
    return 1 if axis == 0 and info.shape[0] is None else info.example[axis]


def _noise(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def compare(
    original: Program,
    original_model: Model,
    fused: Program,
    fused_model: Model,
    inputs: Iterator[tuple[Tensor, ...]],
    limits: Limits,
) -> Verification:
    """Return the verdict on ``fused_model`` against ``original_model``, both called like the original.

    The programs give the float64 runs. Every floating output is judged; a NaN in the fused one alone is a failure.
    """
    choices = count_choices(original)
    if not choices or count_choices(fused) != choices:
        return judge((_runs(original, original_model, fused, fused_model, leaves) for leaves in inputs), limits)
    runs = (_runs_choosing(original, original_model, fused, fused_model, leaves) for leaves in inputs)
    found = judge(runs, limits)
    told = "which values are chosen (top-k, largest): rounding alone changes it, so both models were given one choice"
    found = replace(found, assumptions=(*found.assumptions, told))
    if isinstance(fused_model, nn.Module):
        return found
    return replace(found, not_checked=(*found.not_checked, "outputs of the runtime itself, which makes its own choice"))


@dataclass(frozen=True)
class Outputs:
    """What the original and the fused model gave for one input, and what both give in float64."""

    expected: list[Tensor]
    found: list[Tensor]
    exact: list[Tensor]
    exact_fused: list[Tensor]


def judge(runs: Iterator[Outputs], limits: Limits) -> Verification:
    """Return the verdict on all ``runs`` together, as if they were one batch: it does not depend on how it is cut.

    Where large values cancel in one sample, its own rounding is a draw that says little; that of all samples says more.
    """
    tally = _Tally()
    per_sample = []
    with torch.no_grad():
        for outputs in runs:
            sample = _add_sample(tally, outputs, limits)
            per_sample.append(
                {
                    "max_abs": max((seen.difference for seen in sample), default=0.0),
                    "noise": max((seen.noise for seen in sample), default=0.0),
                }
            )
    return _verdict(tally, tuple(per_sample), limits)


def _runs(
    original: Program, original_model: Model, fused: Program, fused_model: Model, leaves: tuple[Tensor, ...]
) -> Outputs:
    args, kwargs = _call(original, leaves)
    with running("the model"):
        expected = tensors_in(original_model(*args, **kwargs))
    return Outputs(
        expected,
        tensors_in(fused_model(*args, **kwargs)),
        tensors_in(run_program(original, leaves)[0]),
        tensors_in(run_program(fused, leaves)[0]),
    )


def _runs_choosing(
    original: Program, original_model: Model, fused: Program, fused_model: Model, leaves: tuple[Tensor, ...]
) -> Outputs:
    """Return the runs with the original's choices in all four, and the scores among the outputs.

    The graphs are run in place of the models, which cannot be told what to choose.
    """
    del original_model, fused_model
    first = run_choosing(original, leaves, in_double=False)
    forms = [(fused, False), (original, True), (fused, True)]
    others = [run_choosing(program, leaves, in_double=double, chosen=first.chosen) for program, double in forms]
    return Outputs(first.tensors(), *(run.tensors() for run in others))


def _call(program: Program, leaves: tuple[Tensor, ...]) -> tuple[Any, Any]:
    remaining = iter(leaves)
    return program.arguments.unflatten(remaining), program.keywords.unflatten(remaining)


def _add_sample(tally: _Tally, runs: Outputs, limits: Limits) -> list[_Seen]:
    """Add one sample to ``tally``; return the figures of its own outputs."""
    expected, found = runs.expected, runs.found
    is_alike = len(expected) == len(found) and all(a.shape == b.shape for a, b in zip(expected, found, strict=True))
    if not is_alike:
        tally.is_bad = True
    sample = []
    for index, reference in enumerate(expected):
        if not reference.is_floating_point():
            tally.is_bad |= is_alike and not torch.equal(reference, found[index])
            continue
        if is_alike:
            seen = _add_output(tally, reference, found[index], runs.exact[index], runs.exact_fused[index], limits)
        else:
            seen = _Seen(reference.dtype, difference=float("inf"))
        tally.outputs.setdefault(index, _Seen(reference.dtype)).add(seen)
        sample.append(seen)
    return sample


def _add_output(
    tally: _Tally, reference: Tensor, value: Tensor, double: Tensor, double_fused: Tensor, limits: Limits
) -> _Seen:
    """Count one output of one sample in ``tally``; return its figures."""
    seen = _Seen(reference.dtype)
    overflowed = ~torch.isfinite(reference) & torch.isfinite(double)
    if bool(overflowed.any()):
        # One convolution has no sums between that overflow, or has others. What is right there, float64 tells.
        reference = torch.where(overflowed, double.to(seen.dtype), reference)
        value = torch.where(overflowed & ~torch.isfinite(value), double_fused.to(seen.dtype), value)
        tally.overflowed += int(overflowed.sum())
    if not _same_finiteness(reference, value):
        tally.is_bad = True
        seen.difference = float("inf")
        return seen
    finite = torch.isfinite(reference)
    if not bool(finite.any()):
        return seen
    reference64 = reference.double()[finite]
    difference = (value.double()[finite] - reference64).abs()
    seen.range = float(reference64.abs().max())
    seen.noise = float((reference64 - double[finite]).abs().max())
    seen.difference = float(difference.max())
    seen.float64 = float((double_fused - double).abs()[finite].max())
    if limits.is_by_value:
        allowed = (limits.atol or 0.0) + (limits.rtol or 0.0) * reference64.abs()
        tally.is_bad |= bool((difference > allowed).any())
        tally.allowed = max(tally.allowed, float(allowed.max()))
    tally.close += int(torch.isclose(value, reference)[finite].sum())
    tally.values += int(finite.sum())
    if reference.ndim == 2 and reference.shape[1] > 1:
        tally.top1_same += int((reference.argmax(1) == value.argmax(1)).sum())
        tally.top1_all += reference.shape[0]
    return seen


def _share(figure: float, whole: float) -> float:
    if not whole:
        return float("inf") if figure else 0.0
    return figure / whole


def _same_finiteness(reference: Tensor, value: Tensor) -> bool:
    return torch.equal(torch.isnan(reference), torch.isnan(value)) and torch.equal(
        torch.where(torch.isinf(reference), reference, 0), torch.where(torch.isinf(value), value, 0)
    )


def _rounding(over: list[_Seen], limits: Limits) -> str | None:
    """Return what to say where the original's own rounding is beyond what can be told from a wrong answer."""
    if not all(seen.is_noise(limits.max_ratio) for seen in over):
        return None
    worst = max(over, key=lambda seen: seen.noise)
    return (
        f"rounding, which alone moves the original's own outputs by {worst.noise:.1e} on these inputs, where "
        f"{worst.limit(limits.max_ratio):.1e} is allowed. Give real inputs (--inputs), or limits of your own (--rtol, "
        "--atol)"
    )


def _verdict(tally: _Tally, per_sample: tuple[dict[str, float], ...], limits: Limits) -> Verification:
    outputs = tally.outputs.values()
    over = [seen for seen in outputs if seen.difference > seen.limit(limits.max_ratio)]
    is_bad = tally.is_bad or (bool(over) and not limits.is_by_value)
    is_judged = tally.values > 0 or is_bad
    reason = "the model's outputs are all NaN or infinite" if outputs else "the model gives no floating output"
    overflow = f"{tally.overflowed} values overflow in the original, not in float64: those were compared with float64"
    verdict = "fail" if is_bad else ("pass" if is_judged else "partial")

    def largest(figures: Iterable[float]) -> float | None:
        return max(figures, default=0.0) if is_judged else None

    limit = tally.allowed if limits.is_by_value else largest(seen.limit(limits.max_ratio) for seen in outputs)
    return Verification(
        verdict=verdict,
        passed=verdict != "fail",
        close=tally.close / tally.values if tally.values else None,
        max_abs=largest(seen.difference for seen in outputs),
        max_rel=largest(seen.relative(seen.difference) for seen in outputs),
        noise=largest(seen.noise for seen in outputs),
        ratio=largest(seen.ratio for seen in outputs),
        limit=limit if is_judged else None,
        top1=tally.top1_same / tally.top1_all if tally.top1_all else None,
        float64=largest(seen.relative(seen.float64) for seen in outputs),
        per_sample=per_sample,
        looks_like=_rounding(over, limits) if is_bad and not tally.is_bad else None,
        assumptions=(overflow,) if tally.overflowed else (),
        not_checked=() if is_judged else (reason,),
    )
