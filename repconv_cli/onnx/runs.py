"""Both models in onnxruntime, side by side, and the original's float64 run as the yardstick for rounding.

Where the model chooses (top-k, argmax), rounding alone may change all that follows. So the fused model, and every
other run, is given the original's choices: what it chooses from is compared, and what is made of the same choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from repconv_cli.errors import InputError, NotRunnableError
from repconv_cli.graph.interpret import run_program
from repconv_cli.onnx.operator import CHOICES
from repconv_cli.onnx.session import Session
from repconv_cli.onnx.translate import Translated

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# A float64 run that is further from the runtime's than this many times what its inputs' last bits do is none.
_MOST_NOISE = 1000.0
_ULPS = 4


@dataclass(frozen=True)
class SideBySide:
    """One input's outputs: of the original, of the fused model, and of both in float64 (or what stands for it)."""

    expected: list[Tensor]
    found: list[Tensor]
    exact: list[Tensor]
    exact_fused: list[Tensor]


@dataclass
class Comparison:
    """Two models to be run on the same inputs; ``not_checked`` says what could not be done, once they have run."""

    original: Translated
    fused: Translated
    not_checked: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, folder = self.original.file.model, self.original.file.folder
        self.choices = [node for node in model.graph.node if _is_choice(node)]
        self.chosen = [name for node in self.choices for name in node.output if name]
        self.before = [node.input[0] for node in self.choices]
        self.outputs = [value.name for value in model.graph.output]
        self.runtime = Session(_with_outputs(model, self._judged() + self.chosen), folder)
        self.pinned = Session(self._pinned(self.original), folder)
        self.runtime_fused = Session(self._pinned(self.fused), self.fused.file.folder)
        self.has_exact = True

    def _judged(self) -> list[str]:
        """Return the names of what is compared: all outputs, and what is chosen from."""
        return list(dict.fromkeys([*self.outputs, *self.before]))

    def _pinned(self, translated: Translated) -> ModelProto:
        """Return the model with its choices as inputs."""
        made = _with_outputs(translated.file.model, self._judged())
        if not self.choices:
            return made
        kept = [node for node in made.graph.node if not _is_choice(node)]
        types = {name: translated.values[name] for name in self.chosen}
        _replace_nodes(made, kept)
        for name, node in types.items():
            made.graph.input.append(_value_info(name, node))
        return made

    def runs(self, inputs: Iterator[tuple[Tensor, ...]]) -> Iterator[SideBySide]:
        """Yield what all runs give for each of ``inputs``."""
        names = [info.name for info in self.original.program.inputs]
        for leaves in inputs:
            feed = dict(zip(names, leaves, strict=True))
            values = self.runtime.run(feed)
            judged = len(self._judged())
            expected, choices = values[:judged], dict(zip(self.chosen, values[judged:], strict=True))
            found = self.runtime_fused.run(feed | choices)
            moved = self.pinned.run({name: _nudged(value) for name, value in feed.items()} | choices)
            exact = self._exact(leaves, choices, expected, moved)
            if exact is None:
                yield SideBySide(_tensors(expected), _tensors(found), _tensors(moved), _tensors(moved))
            else:
                yield SideBySide(_tensors(expected), _tensors(found), _tensors(exact[0]), _tensors(exact[1]))

    def _exact(
        self, leaves: tuple[Tensor, ...], choices: dict[str, Any], expected: list[Any], moved: list[Any]
    ) -> tuple[list[Any], list[Any]] | None:
        """Return the float64 runs of both models, or None where there are none to rely on."""
        if not self.has_exact:
            return None
        try:
            found = tuple(self._in_float64(translated, leaves, choices) for translated in (self.original, self.fused))
        except (NotRunnableError, RuntimeError) as error:
            reason = error.found if isinstance(error, InputError) else "it cannot be run in float64"
            self._go_without(reason)
            return None
        if not _is_plausible(expected, moved, found[0]):
            self._go_without("its float64 run here is not what onnxruntime rounds")
            return None
        return found[0], found[1]

    def _go_without(self, reason: str) -> None:
        self.has_exact = False
        note = f"the whole model in float64 ({reason}); the noise is what the last bit of its inputs makes of outputs"
        self.not_checked[note] = None

    def _in_float64(self, translated: Translated, leaves: tuple[Tensor, ...], choices: dict[str, Any]) -> list[Any]:
        pins = [op for op in translated.operators() if op.is_choice]
        for op in pins:
            op.pinned = tuple(choices[name] if name else None for name in op.node.output)
        try:
            wanted: list[fx.Node] = [translated.values[name] for name in self._judged()]
            _, kept = run_program(translated.program, leaves, wanted)
        finally:
            for op in pins:
                op.pinned = None
        constants = translated.program.tensors
        return [constants[str(node.target)] if node.op == "get_attr" else kept[node] for node in wanted]


def _is_choice(node: NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in CHOICES


def _tensors(values: list[Any]) -> list[Tensor]:
    flat = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    return [value for value in flat if isinstance(value, Tensor)]


def _with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """Return ``model`` giving the values called ``names``."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    declared = {value.name: value for value in (*model.graph.output, *model.graph.input)}
    del made.graph.output[:]
    for name in names:
        if name in declared:
            made.graph.output.add().CopyFrom(declared[name])
        else:
            made.graph.output.add().name = name
    return made


def _replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    import onnx

    copies = [onnx.NodeProto() for _ in nodes]
    for copy, node in zip(copies, nodes, strict=True):
        copy.CopyFrom(node)
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _value_info(name: str, node: fx.Node) -> Any:
    import onnx

    from repconv_cli.onnx.values import ELEMENT_TYPES

    if "dtype" not in node.meta:
        raise InputError(f"the type of what {name[:60]!r} chooses is not known")
    return onnx.helper.make_tensor_value_info(name, ELEMENT_TYPES[node.meta["dtype"]], [None] * len(node.meta["shape"]))


def _nudged(x: Tensor) -> Tensor:
    """Return ``x`` with the last bit of each value moved, up or down."""
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, x.shape, generator=generator).double() * 2 - 1
    return (x.double() * (1 + torch.finfo(x.dtype).eps * signs)).to(x.dtype)


def _is_plausible(expected: list[Any], moved: list[Any], exact: list[Any]) -> bool:
    """Whether the float64 run differs from the runtime's by rounding: a wrong yardstick would let all else pass."""
    pairs = list(zip(_tensors(expected), _tensors(moved), _tensors(exact), strict=False))
    if not len(_tensors(expected)) == len(_tensors(exact)) == len(pairs):
        return False
    for value, other, double in pairs:
        if value.shape != double.shape:
            return False
        if not value.is_floating_point() or not value.numel():
            continue
        finite = torch.isfinite(value)
        if not torch.equal(finite, torch.isfinite(double)):
            return False
        if not bool(finite.any()):
            continue
        spread = float(value[finite].double().abs().max())
        rounding = max(_largest(value, other, finite), _ULPS * torch.finfo(value.dtype).eps * spread)
        if _largest(value, double, finite) > _MOST_NOISE * rounding:
            return False
    return True


def _largest(left: Tensor, right: Tensor, where: Tensor) -> float:
    difference = (left.double() - right.double()).abs()[where]
    return float(difference.nan_to_num(nan=float("inf")).max())
