"""Well-formed files whose content is no net that can be fused, or whose names would do harm in a report."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoint.hostile_files import Stored, checkpoint, pickled, tensor_claim
from tests.hostile.case import Case, make_net, make_state

NAMES = {
    "an escape": "\x1b[31mred\x1b[0m",
    "a window title": "\x1b]0;owned\x07",
    "line breaks": "a\r\n\u2028error: all is well",
    "text from right to left": "\u202eevil",
    "rich markup": "[red]x[/red][link=http://evil]y[/link][/]",
    "HTML": "<script>alert(1)</script>",
    "a lone surrogate": "\ud800",
    "10,000 characters": "n" * 10_000,
    "a backspace": "a\b\b\bb",
    "the first C1 character": "\x9b31m",
}


def _saved(make: Callable[[], object]) -> Callable[[Path], object]:
    return lambda path: torch.save(make(), path)


def _renamed_layer(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = make_net()
        # add_module refuses some names that a pickle can hold.
        net._modules[name] = net._modules.pop("3")
        return net

    return make


def _state(**changed: Any) -> Callable[[Path], object]:
    """Return a writer of the weights, some replaced; ``None`` takes one away."""

    def write(path: Path) -> None:
        state = make_state()
        for key, value in changed.items():
            state[key] = value
        torch.save({key: value for key, value in state.items() if value is not None}, path)

    return write


def _net_with(key: str, value: torch.Tensor | None) -> Callable[[], nn.Module]:
    """Return a maker of the net, with one tensor replaced behind its back."""

    def make() -> nn.Module:
        net = make_net()
        layer, name = net[int(key[0])], key[2:]
        table = layer._buffers if name in layer._buffers else layer._parameters
        table[name] = value if value is None or table is layer._buffers else nn.Parameter(value, requires_grad=False)  # type: ignore[assignment]
        return net

    return make


def _self_containing() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    net._modules["1"] = net
    return net


def _cycle_of_lists() -> object:
    items: list[Any] = [1]
    items.append({"again": items})
    return {"0.weight": torch.ones(1), "x": items}


def _overlapping(path: Path) -> None:
    # Two tensors that read each other's elements: legal, as tied weights are.
    stored = Stored("0", 40)
    values = {
        "0.weight": tensor_claim(stored, 0, (4, 1, 3, 3), (9, 9, 3, 1)),
        "1.bias": tensor_claim(stored, 2, (4,), (1,)),
    }
    checkpoint(path, pickled(values), {"0": struct.pack("<40f", *range(40))})


def _overflowing() -> nn.Module:
    """Return a net in half precision whose norm has so small a variance that the fused bias is beyond 65504."""
    net = make_net()
    net[1].running_mean.fill_(400.0)  # type: ignore[operator, union-attr]
    net[1].running_var.fill_(1e-6)  # type: ignore[operator, union-attr]
    return net.half()


def _without(name: str) -> Callable[[], nn.Module]:
    """Return a maker of the net whose first layer lacks what every module has."""

    def make() -> nn.Module:
        net = make_net()
        del net[0].__dict__[name]
        return net

    return make


def _attributes(**changed: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = make_net()
        net[0].__dict__.update(changed)
        return net

    return make


_FLOATS = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": float("-inf")}
_CANNOT = "cannot|not be guessed"
WEIGHTS = [
    ("whole", _state(), None),
    *((f"{name} in a weight", _state(**{"0.weight": torch.full((4, 1, 3, 3), value)}), "NaN or infinite")
      for name, value in _FLOATS.items()),
    ("NaN in a buffer", _state(**{"1.running_var": torch.full((4,), float("nan"))}), "NaN or infinite"),
    ("NaN in half precision", _state(**{"0.weight": torch.full((4, 1, 3, 3), float("nan")).half()}), "NaN or infinite"),
    ("weights of whole numbers", _state(**{"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.int64)}), "int64"),
    ("weights of truth values", _state(**{"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}), "bool"),
    ("complex weights", _state(**{"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.complex64)}), "complex64"),
    ("negative variance", _state(**{"1.running_var": torch.full((4,), -1.0)}), "NaN or infinite"),
    ("missing norm keys", _state(**{"1.running_mean": None, "1.running_var": None}), "2 missing"),
    ("missing weight", _state(**{"3.bias": None}), "1 missing"),
    ("mismatched shape", _state(**{"0.weight": torch.ones(4, 1, 1, 1)}), r"has shape \(4, 1, 1, 1\)"),
    ("mismatched rank", _state(**{"3.bias": torch.ones(2, 1)}), r"has shape \(2, 1\)"),
    ("empty weight", _state(**{"0.weight": torch.ones(0, 1, 3, 3)}), r"has shape \(0, 1, 3, 3\)"),
    ("number for a weight", _state(**{"0.weight": 1.0}), "1 missing"),
    ("number for a name", _saved(lambda: {**make_state(), 7: torch.ones(1)}), "1 unexpected"),
    ("overlapping tensors", _overlapping, "missing"),
    *((f"name with {what}", _saved(lambda name=name: {**make_state(), name: torch.ones(1)}), "1 unexpected")
      for what, name in NAMES.items()),
    ("tensor called __metadata__", _saved(lambda: {**make_state(), "__metadata__": torch.ones(1)}), "1 unexpected"),
]  # fmt: skip

MODULES = [
    ("whole", _saved(make_net), None),
    *((f"name with {what}", _saved(_renamed_layer(name)),
       None if name.isprintable() else "unusable name")
      for what, name in NAMES.items()),
    ("layer called __metadata__", _saved(_renamed_layer("__metadata__")), None),
    ("layer with a dot in its name", _saved(_renamed_layer("a.b")), "unusable name"),
    ("layer without a name", _saved(_renamed_layer("")), "unusable name"),
    ("layer called forward", _saved(_renamed_layer("forward")), ""),
    ("layer called state_dict", _saved(_renamed_layer("state_dict")), ""),
    ("NaN", _saved(_net_with("0.weight", torch.full((4, 1, 3, 3), float("nan")))), "NaN or infinite"),
    ("whole numbers", _saved(_net_with("0.weight", torch.ones(4, 1, 3, 3, dtype=torch.int32))), ""),
    ("complex numbers", _saved(_net_with("0.weight", torch.ones(4, 1, 3, 3, dtype=torch.complex64))), ""),
    ("two types", _saved(_net_with("0.weight", torch.ones(4, 1, 3, 3, dtype=torch.float64))), _CANNOT),
    ("weight of another rank", _saved(_net_with("0.weight", torch.ones(36))), _CANNOT),
    ("empty weight", _saved(_net_with("0.weight", torch.ones(0, 1, 3, 3))), ""),
    ("missing weight", _saved(_net_with("0.weight", None)), _CANNOT),
    ("missing mean", _saved(_net_with("1.running_mean", None)), ""),
    ("short mean", _saved(_net_with("1.running_mean", torch.ones(3))), _CANNOT),
    ("negative variance", _saved(_net_with("1.running_var", torch.full((4,), -1.0))), "NaN or infinite"),
    ("half precision that a fused bias overflows", _saved(_overflowing), ""),
    *((f"lack of {name}", _saved(_without(name)), "lack what every module has|cannot|no table of")
      for name in ("training", "_modules", "_buffers", "_forward_hooks", "in_channels", "stride")),
    *((f"number for {name}", _saved(_attributes(**{name: 0})),
       "lack what every module has|cannot|neither true|no table of")
      for name in ("training", "_non_persistent_buffers_set", "_state_dict_hooks", "_parameters")),
    # torch fills in the one, and takes the other for no hooks.
    ("lack of hooks for a state", _saved(_without("_state_dict_hooks")), None),
    ("number for no hooks", _saved(_attributes(_forward_hooks=0)), None),
    ("text for a stride", _saved(_attributes(stride="\x1b[31mred")), _CANNOT),
    ("no stride", _saved(_attributes(stride=None)), _CANNOT),
    ("stride of zero", _saved(_attributes(stride=(0, 0))), _CANNOT),
    ("negative padding", _saved(_attributes(padding=(-1, -1))), _CANNOT),
    ("no groups", _saved(_attributes(groups=0)), _CANNOT),
    ("text for the kernel size", _saved(_attributes(kernel_size="x")), ""),
    ("unknown padding mode", _saved(_attributes(padding_mode="\x1b[31mred")), _CANNOT),
    ("text for the channels", _saved(_attributes(in_channels="many\x1b")), _CANNOT),
    ("negative channels", _saved(_attributes(in_channels=-1)), _CANNOT),
    ("module in itself", _saved(_self_containing), "contains itself"),
    ("list in itself", _saved(_cycle_of_lists), "needed: the architecture"),
    ("nothing", _saved(lambda: None), "holds a None"),
    ("a number", _saved(lambda: 1), "holds a int"),
    ("a list", _saved(lambda: [torch.ones(2)]), "holds a list"),
    ("an empty net", _saved(nn.Sequential), _CANNOT),
    ("an empty dict", _saved(OrderedDict), "no weights"),
    ("no architecture", _saved(make_state), "needed: the architecture"),
    ("sparse weights", _saved(lambda: {"w": torch.eye(3).to_sparse()}), "sparse tensor"),
    ("weights without values", _saved(lambda: {"w": torch.empty(3, device="meta")}), "meta device"),
    ("integers beyond 64 bits", _saved(lambda: {"w": torch.ones(1), "x": 1 << 200}), "more than 128 bits"),
]  # fmt: skip


def _saved_safely(path: Path) -> None:
    save_file({"0.weight": torch.tensor([float("inf")])}, path)


CASES = (
    *(Case(f"weights: {name}", write, reason, True) for name, write, reason in WEIGHTS),
    *(Case(f"module: {name}", write, reason) for name, write, reason in MODULES),
    Case("weights: infinity in safetensors", _saved_safely, "NaN or infinite", True),
)
