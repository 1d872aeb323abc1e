"""Results as the commands make them, from plain data: the report needs no model."""

from __future__ import annotations

from repconv_cli.results import (
    BlockFacts,
    Change,
    InputFacts,
    LargestError,
    OutputFacts,
    RefusalFacts,
    Result,
    SourceFacts,
    Totals,
    Verification,
)

# Figures of timm's repvgg_a0: (name, branches, weight, parameters before).
_STAGES = [
    ("stem", 2, (48, 3, 3, 3)),
    ("stages.0.0", 2, (48, 48, 3, 3)),
    ("stages.0.1", 3, (48, 48, 3, 3)),
    ("stages.1.0", 2, (96, 48, 3, 3)),
    *((f"stages.1.{i}", 3, (96, 96, 3, 3)) for i in range(1, 4)),
    ("stages.2.0", 2, (192, 96, 3, 3)),
    *((f"stages.2.{i}", 3, (192, 192, 3, 3)) for i in range(1, 14)),
    ("stages.3.0", 2, (1280, 192, 3, 3)),
]


def block(name: str, branches: int = 3, weight: tuple[int, ...] = (8, 8, 3, 3), proven: bool = False) -> BlockFacts:
    kinds = ("3×3", "1×1", "identity")[:branches]
    weights = weight[0] * weight[1]
    return BlockFacts(
        name=name,
        kind=" + ".join(kinds),
        branches=kinds,
        sources=(f"{name}.conv_kxk.conv.weight", f"{name}.conv_1x1.conv.weight"),
        target=f"{name}.conv_kxk.conv.weight",
        weight_shape=weight,
        ops=Change(2 * branches + 1, 1),
        macs=Change(weights * 10 * 196, weights * 9 * 196),
        params=Change(weights * 10 + 4 * weight[0], weights * 9 + weight[0]),
        certificate={"error": 7.5e-16, "limit": 1e-12} if proven else None,
    )


REPVGG_A0 = tuple(block(*stage) for stage in _STAGES)
SOURCE = SourceFacts("repvgg_a0.pt", "weights", "a" * 64, 36_654_987, "float32", 351, False)
INPUT = InputFacts(((None, 3, None, None),), ((2, 3, 224, 224),), True)
TOTALS = Totals(
    Change(44, 22), Change(61, 0), Change(169, 47), Change(9_108_968, 8_309_384), Change(1_512_581_120, 1_361_451_008)
)
PASSED = Verification(
    "pass", True, 0.98, 8.5e-6, 1e-6, 5.3e-6, 1.6, 5.3e-5, 1.0, 3e-7, ({"max_abs": 8.5e-6, "noise": 5.3e-6},) * 4
)
FAILED = Verification(
    "fail", False, 0.0, 1.9, 0.3, 5.3e-6, 3.7e5, 5.3e-5, 0.0, 0.3, ({"max_abs": 1.9, "noise": 5.3e-6},),
    first_bad_block="stages.1.2", looks_like="the identity branch was left out of stages.1.2",
    largest_error=LargestError("stages.1.2.conv_kxk.conv.weight", (4, 4, 1, 1), 1.25, 0.25), tensors_checked=46,
)  # fmt: skip
REFUSALS = (
    RefusalFacts("stages.0.mlp.fc1", "conv2d_7", "exact as one convolution, but 45.2 times the work (23 → 1,062 MACs)"),
    RefusalFacts("stages.1.mlp.fc1", "conv2d_9", "exact as one convolution, but 45.2 times the work (23 → 1,062 MACs)"),
    RefusalFacts("head.norm", "norm_3", "a norm after relu, with no convolution to fold into"),
)
OUTPUT = OutputFacts("repvgg_a0.safetensors", 33_244_160, "950df12f" * 8, False)

INSPECTED = Result("inspect", SOURCE, INPUT, REPVGG_A0, (), TOTALS)
FUSED = Result(
    "fuse", SOURCE, INPUT, tuple(block(*stage, proven=True) for stage in _STAGES), REFUSALS, TOTALS, PASSED, OUTPUT,
    ("2 tensors that no output depends on were left out, such as head.unused",), {"Reading": 0.2, "Fusing": 1.5},
)  # fmt: skip
VERIFIED = Result("verify", SOURCE, INPUT, verification=PASSED, output=OUTPUT)
DIFFERENT = Result("verify", SOURCE, INPUT, verification=FAILED, output=OUTPUT)
