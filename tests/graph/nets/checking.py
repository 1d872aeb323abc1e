"""Fuse a net and compare it with the module in float64; shrink a net that fails to the smallest that still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from repconv_cli.graph.certificate import LIMIT
from repconv_cli.graph.fuse import Fused, fuse_program
from repconv_cli.graph.plan import count_ops
from repconv_cli.graph.program import Program
from repconv_cli.graph.serial import from_json, to_json
from repconv_cli.graph.trace import trace
from repconv_cli.verdict import random_inputs
from tests.graph.nets.language import Layer, Net, NetModule, record
from tests.graph.proof import TOLERANCE, in_float64, noise


@dataclass(frozen=True)
class Outcome:
    """What fusing a net gave; all that was wrong raises :class:`WrongError` instead."""

    blocks: int
    convs_before: int
    convs_after: int
    refusals: tuple[str, ...]
    certificate: float
    difference: float
    shapes: int


class WrongError(AssertionError):
    """A fused net that differs from its module, costs more, or changed its source."""


def check(net: Net, *, is_exported: bool = False) -> Outcome:
    """Return the outcome of fusing ``net``, recorded or (slowly) exported by torch; raise what goes wrong."""
    module = NetModule(net).eval()
    program = _exported(module) if is_exported else record(module)
    before = {key: value.clone() for key, value in program.tensors.items()}
    found = fuse_program(program, random_inputs(program, 1, net.seed))
    if not all(torch.equal(program.tensors[key], value) for key, value in before.items()):
        raise WrongError("a tensor of the source changed")
    counts = count_ops(program), count_ops(found.program)
    for name in ("norms", "ops"):
        if counts[1][name] > counts[0][name]:
            raise WrongError(f"{name} grew from {counts[0][name]} to {counts[1][name]}")
    work = tuple(_work(part, net.shape) for part in (program, found.program))
    if work[1] > work[0]:
        raise WrongError(f"multiply-accumulates grew from {work[0]} to {work[1]}")
    worst, shapes = _worst(module, found)
    reasons = tuple(refusal.reason for refusal in found.plan.refusals)
    if not all(refusal.reason and refusal.name for refusal in found.plan.refusals):
        raise WrongError("a refusal without a reason or a name")
    certificate = max((c.error for c in found.certificates), default=0.0)
    if not (worst <= TOLERANCE and certificate <= LIMIT):
        raise WrongError(f"outputs differ by {worst:.1e}, certificate {certificate:.1e}")
    return Outcome(len(found.plan.blocks), counts[0]["convs"], counts[1]["convs"], reasons, certificate, worst, shapes)


def _check_written(found: Fused) -> None:
    """Raise unless the fused graph, written as JSON and read again, gives equal outputs to the bit."""
    again = from_json(to_json(found.program), found.program.tensors)
    _check_equal(found.program, again, 0.0, "written and read again")


def _check_fused_again(found: Fused) -> None:
    """Raise unless the fused model, cast to float32, can be fused once more, as a user's checkpoint may be."""
    single = {key: tensor.float() for key, tensor in found.program.tensors.items()}
    program = replace(found.program, tensors=single)
    again = fuse_program(program, random_inputs(program, 1, 0))
    _check_equal(program, again.program, TOLERANCE, "fused again")


def _check_one_block(found: Fused) -> None:
    """Raise unless one block alone can be fused, as ``--blocks`` does."""
    program = found.plan.program
    for block in found.plan.blocks[:2]:
        alone = fuse_program(program, random_inputs(program, 1, 0), only=block.name)
        _check_equal(program, alone.program, TOLERANCE, f"{block.name} alone")


def _check_equal(before: Program, after: Program, tolerance: float, what: str) -> None:
    x = noise(before.inputs[0].example, seed=3)[0].double()
    with torch.no_grad():
        expected, outputs = (in_float64(program)(x) for program in (before, after))
    worst = max(_relative(a, b) for a, b in zip(expected, outputs, strict=True))
    if not worst <= tolerance:
        raise WrongError(f"{what}: outputs differ by {worst:.1e}")


def _work(program: Program, shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of one run, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        in_float64(program)(torch.zeros(shape, dtype=torch.float64))
    return counter.get_total_flops() // 2


def _exported(module: NetModule) -> Program:
    net = module.net
    may_vary = (True, False, *(net.is_spatial_free for _ in net.shape[2:]))
    return trace(module, noise(net.shape), may_vary=(may_vary,))


def _shapes(program: Program) -> Iterator[tuple[int, ...]]:
    """Yield the example's shape with other batches and, where free, other spatial sizes, each axis by itself."""
    batch, channels, *sizes = program.inputs[0].example
    free = [size is None for size in program.inputs[0].shape]
    batches = (1, 2, 3) if free[0] else (batch,)
    growths = [(0, 0, 0), (1, 0, 2), (0, 1, 1), (3, 2, 0)] if any(free[2:]) else [(0, 0, 0)]
    for index, growth in enumerate(growths):
        grown = (size + more * is_free for size, more, is_free in zip(sizes, growth, free[2:], strict=False))
        yield (batches[index % len(batches)], channels, *grown)
    if free[0]:
        yield (3, channels, *sizes)


def _worst(module: NetModule, found: Fused) -> tuple[float, int]:
    """Return the largest difference relative to each output's range, over the shapes that the module takes."""
    module, fused = module.double(), in_float64(found.program)
    worst, shapes = 0.0, 0
    for index, shape in enumerate(_shapes(found.program)):
        x = noise(shape, seed=index + 1)[0].double()
        with torch.no_grad():
            try:
                expected = module(x)
            except RuntimeError:
                continue  # sizes that no longer fit, as a sum with a part cut at a fixed place
            for a, b in zip(expected, fused(x), strict=True):
                worst = max(worst, _relative(a, b))
        shapes += 1
    return worst, shapes


def _relative(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise WrongError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if error != error:
        raise WrongError("NaN where the module gives none")
    return error / scale if scale else error


def is_valid(net: Net) -> bool:
    """Whether torch itself runs the net, at every size if sizes are free: a shrunk one may not fit together."""
    batch, channels, *sizes = net.shape
    try:
        module = NetModule(net)
        record(module)
        with torch.no_grad():
            for growth in range(1, 10) if net.is_spatial_free else ():
                module(torch.ones((batch, channels, *(size + growth * (size > 1) for size in sizes))))
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def with_valid_sizes(net: Net) -> Net:
    """Return ``net``, its sizes fixed where torch.export fixes them: it needs certain sizes, or cuts at a place."""
    is_free = net.is_spatial_free and not any(map(_cuts_at_a_place, net.layers)) and is_valid(net)
    return replace(net, is_spatial_free=is_free and not _has_free_size_of_1(net))


def _has_free_size_of_1(net: Net) -> bool:
    """Whether a value inside has one position at the example and more elsewhere: torch.export takes it for that one."""
    values = (node.meta for node in record(NetModule(net)).graph.nodes if "free" in node.meta)
    return any(size == 1 and free for meta in values for size, free in zip(meta["shape"], meta["free"], strict=True))


def _cuts_at_a_place(layer: Layer) -> bool:
    """Whether it is a crop that needs a smallest size: up to a fixed place, or from one counted from the end."""
    o = layer.options
    return layer.kind == "window" and o["dim"] > 1 and (0 < o["end"] < 2**31 or o["start"] < 0)


def shrunk(net: Net, fails: Callable[[Net], bool]) -> Net:
    """Return the smallest net found that still fails: layers taken out, options and outputs made plain."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(net):
            if fails(smaller):
                net, is_smaller = smaller, True
                break
    return net


def _smaller(net: Net) -> Iterator[Net]:
    for output in net.outputs:
        if len(net.outputs) > 1:
            yield replace(net, outputs=tuple(o for o in net.outputs if o != output))
    for index in range(len(net.layers) - 1, -1, -1):
        yield from _without(net, index)
    if net.is_spatial_free:
        yield replace(net, is_spatial_free=False)
    for index, layer in enumerate(net.layers):
        for options in _plainer(layer):
            changed = replace(layer, options=options)
            yield replace(net, layers=(*net.layers[:index], changed, *net.layers[index + 1 :]))
        if layer.like is not None:
            yield replace(net, layers=(*net.layers[:index], replace(layer, like=None), *net.layers[index + 1 :]))
    for axis in range(2, len(net.shape)):
        if net.shape[axis] > 3:
            yield replace(net, shape=(*net.shape[:axis], net.shape[axis] - 1, *net.shape[axis + 1 :]))


def _without(net: Net, index: int) -> Iterator[Net]:
    """Yield the net without a layer: what read it reads one of its inputs instead."""
    for source in dict.fromkeys(net.layers[index].reads):

        def moved(value: int, source: int = source) -> int:
            value = source if value == index + 1 else value
            return value - (value > index + 1)

        layers = []
        for place, layer in enumerate(net.layers):
            if place != index:
                like = None if layer.like in (None, index) else layer.like - (layer.like > index)  # type: ignore[operator]
                layers.append(replace(layer, reads=tuple(map(moved, layer.reads)), like=like))
        outputs = tuple(dict.fromkeys(map(moved, net.outputs)))
        if outputs != (0,):
            yield replace(net, layers=tuple(layers), outputs=outputs)


_PLAIN = {
    "bias": False,
    "groups": 1,
    "mode": "zeros",
    "made_of": "plain",
    "affine": False,
    "ceil": False,
    "count": True,
    "divisor": None,
    "alpha": 1,
    "sign": "+",
    "excess": 0,
    "constant": "own",
}


def _plainer(layer: Layer) -> Iterator[dict[str, object]]:
    for name, value in layer.options.items():
        if name in _PLAIN and value != _PLAIN[name]:
            yield {**layer.options, name: _PLAIN[name]}
        if name in ("dilation", "stride") and set(value) != {1}:
            yield {**layer.options, name: (1,) * len(value)}
        if name == "padding" and set(value) != {0}:
            yield {**layer.options, name: (0,) * len(layer.options["kernel"])}
        if name == "kernel" and set(value) != {1}:
            yield {**layer.options, name: tuple(max(k - 1, 1) for k in value)}
