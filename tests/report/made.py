"""Results as the commands make them, from plain data: the report needs no model."""

from __future__ import annotations

from dataclasses import replace

from repconv_cli.results import (
    BenchFacts,
    BlockFacts,
    Change,
    Contents,
    Drawing,
    InputFacts,
    KernelFacts,
    LargestError,
    NodeFacts,
    OutputFacts,
    Picture,
    RangeFacts,
    RefusalFacts,
    Result,
    RuntimeFacts,
    SourceFacts,
    TensorFacts,
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
    RefusalFacts("stages.1.mlp.fc1", "conv2d_9", "exact as one convolution, but 36.6 times the work (29 → 1,062 MACs)"),
    RefusalFacts("neck.pool", "avg_pool_1", "average pool in ceil mode: windows past the border average fewer values"),
    RefusalFacts("head.norm", "norm_3", "a norm after relu, with no convolution to fold into"),
)
OUTPUT = OutputFacts("repvgg_a0.safetensors", 33_244_160, "950df12f" * 8, False)

INSPECTED = Result("inspect", SOURCE, INPUT, REPVGG_A0, (), TOTALS)
FUSED = Result(
    "fuse", SOURCE, INPUT, tuple(block(*stage, proven=True) for stage in _STAGES), REFUSALS, TOTALS, PASSED, OUTPUT,
    notes=("2 tensors that no output depends on were left out, such as head.unused",),
    seconds={"Reading": 0.2, "Fusing": 1.5},
)  # fmt: skip
VERIFIED = Result("verify", SOURCE, INPUT, verification=PASSED, output=OUTPUT)
BENCHED = Result(
    "bench", SOURCE, INPUT, totals=TOTALS, verification=PASSED,
    bench=BenchFacts(
        ((1, 3, 224, 224),), 1, "a processor",
        (
            RuntimeFacts("eager", "torch 2.14.1", 30.2, 20.1, 1.50, 1.48, 1.53, 40, "gain", 9_000_000, 5_000_000),
            RuntimeFacts("openvino", "2026.2", problem="it cannot read the model"),
        ),
    ),
)  # fmt: skip
UNKNOWN = Change(None, None)
LISTED = Result(
    "inspect", SOURCE, InputFacts((), (), False), totals=Totals(UNKNOWN, UNKNOWN, UNKNOWN, Change(48, None), UNKNOWN),
    contents=Contents(
        "safetensors", tuple(TensorFacts(f"layers.{i}.weight", "float32", (4, 4)) for i in range(3)), {"float32": 48},
        48,
    ),
)  # fmt: skip
DIFFERENT = Result("verify", SOURCE, INPUT, verification=FAILED, output=OUTPUT)


def nodes(count: int, per_block: int = 6, width: int = 3) -> tuple[NodeFacts, ...]:
    """A graph of ``count`` operators: blocks of ``width`` branches and a residual connection, ten to a stage."""
    made = [NodeFacts("x", "input", "", (2, 3, 64, 64), (), ())]
    while len(made) < count:
        index = (len(made) - 1) // (per_block + 1)
        module, start = f"backbone.stages.{index // 10}.{index % 10}", len(made) - 1
        for branch in range(width):
            weight = (64, 64, 3, 3) if branch == 0 else (64, 64, 1, 1)
            made.append(
                NodeFacts(
                    f"conv2d_{len(made)}", "conv2d", f"{module}.branch_{branch}", (2, 64, 32, 32), weight,
                    (start,), index,
                )
            )  # fmt: skip
        made.append(NodeFacts(f"add_{len(made)}", "add", module, (2, 64, 32, 32), (), (start + 1, start + 2), index))
        made.append(
            NodeFacts(f"add_{len(made)}", "add", module, (2, 64, 32, 32), (), (len(made) - 1, start + 3), index)
        )
        made.append(NodeFacts(f"add_{len(made)}", "add", module, (2, 64, 32, 32), (), (len(made) - 1, start)))
        made.append(NodeFacts(f"relu_{len(made)}", "relu", module, (2, 64, 32, 32), (), (len(made) - 1,)))
    return tuple(made[:count])


def picture() -> Picture:
    corner = (0.25, 0.0, 0.0, 0.0, -0.5, 0.0, 0.0, 0.0, 0.125)
    centre = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    total = tuple(a + b for a, b in zip(corner, centre, strict=True))
    return Picture(
        (3, 3),
        ((4, 4),),
        (KernelFacts("3×3", (3, 3), corner, (corner,)), KernelFacts("identity", (1, 1), centre, (centre,))),
        KernelFacts("sum", (3, 3), total, (total,)),
        (RangeFacts("a.weight", -0.5, 0.25, 0.1, 0.01, 0.008),),
        RangeFacts("a.fused.weight", -0.2, 1.6, 0.05, 0.07, 0.02),
    )


def drawn(result: Result, count: int = 60) -> Result:
    """``result`` with a graph of ``count`` operators before."""
    before = nodes(count)
    blocks = sorted({node.block for node in before if node.block is not None})
    facts = tuple(block(f"backbone.stages.{i // 10}.{i % 10}", proven=True) for i in blocks)
    after = [NodeFacts("x", "input", "", (2, 3, 64, 64), (), ())]
    for index, one in enumerate(facts):
        after.append(NodeFacts(f"conv2d_{index}", "conv2d", one.name, (), one.weight_shape, (len(after) - 1,), index))
        after.append(NodeFacts(f"relu_{index}", "relu", one.name, (), (), (len(after) - 1,)))
    drawing = Drawing(before, tuple(after), facts, (picture(),) * len(facts))
    return replace(result, blocks=facts if result.command != "verify" else (), drawing=drawing)
