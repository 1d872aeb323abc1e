"""Files that would run code: each kind of call, in each container, in each protocol."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.checkpoint.hostile_files import Calls, checkpoint, pickled
from tests.hostile import containers
from tests.hostile.case import MARKER, Case, make_net
from tests.hostile.payloads import by_opcode, by_protocol

Container = Callable[[Path, bytes], object]
REFUSED = r"(posix|os)\.mkdir|builtins\.(map|getattr)|functools\.partial|opcode EXT"

CONTAINERS: dict[str, tuple[Container, str | None]] = {
    "zip": (containers.zipped, REFUSED),
    "deflated": (containers.deflated, REFUSED),
    "legacy": (containers.legacy, REFUSED),
    "legacy system information": (lambda path, data: containers.legacy(path, data, 2), REFUSED),
    "legacy storage keys": (lambda path, data: containers.legacy(path, data, 4), REFUSED),
    "TorchScript": (containers.script, REFUSED),
    "bare": (containers.bare, "bare pickle|format is not known"),
    "pt2 weights": (containers.in_program("data/weights/model.pt"), "holds pickled weights"),
    "pt2 constants": (containers.in_program("data/constants/model.pt"), "holds pickled weights"),
    "pt2 compiled": (containers.in_program("data/aotinductor/model/model.so"), "holds compiled code"),
    "pt2 payload": (containers.pickled_payload, "hold pickled or opaque objects"),
    # The sample inputs are a pickle that nobody needs: it stays unread, and the program is fused.
    "pt2 sample inputs": (containers.in_program(containers.SAMPLE_INPUTS), None),
    "pt2 beside it": (containers.in_program("extra/note.pkl"), None),
}


def _by_opcode(opcode: str) -> Callable[[Path], object]:
    return lambda path: containers.zipped(path, by_opcode(path.with_name(MARKER))[opcode])


def _in_container(container: Container) -> Callable[[Path], object]:
    return lambda path: container(path, by_opcode(path.with_name(MARKER))["REDUCE"])


def _in_protocol(container: Container, protocol: int) -> Callable[[Path], object]:
    return lambda path: container(path, by_protocol(path.with_name(MARKER), protocol))


class _Hook:
    """A hook that makes the marker when the module is called."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self, *_: object) -> None:
        self.marker.touch()

    def __reduce__(self) -> Any:
        return (_Hook, (self.marker,))


def _module(**state: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a writer of a module whose own attributes would run something."""

    def write(path: Path) -> None:
        net = make_net()
        net.__dict__.update({name: make(path.with_name(MARKER)) for name, make in state.items()})
        torch.save(net, path)

    return write


def _plain_hook(_: Path) -> object:
    # Everything that the pickle names is admitted: only where it stands makes it code.
    return OrderedDict({0: nn.functional.relu})


def _module_called(path: Path) -> None:
    checkpoint(path, pickled({"model": Calls(nn.Linear, 20000, 20000)}))


def _script_class(path: Path) -> None:
    checkpoint(path, pickled(Calls(torch.jit.load, str(path))))


def _loaded_again(path: Path) -> None:
    inner = path.with_suffix(".inner")
    inner.write_bytes(by_opcode(path.with_name(MARKER))["REDUCE"])
    checkpoint(path, pickled(Calls(torch.load, str(inner), None)))


def _method(path: Path) -> None:
    checkpoint(path, b"\x80\x04\x8c\x17torch.nn.modules.linear\x8c\x0eLinear.forward\x93.")


def _renamed_module(path: Path) -> None:
    checkpoint(path, b"\x80\x02ctorch.nn.modules.linear\nos\n(S'" + os.fsencode(path) + b"'\ntR.")


STATES = {
    "module with a hook of its own": _module(_forward_hooks=lambda marker: {0: _Hook(marker)}),
    "module with a hook from torch": _module(_forward_hooks=_plain_hook),
    "module with a load hook": _module(_load_state_dict_pre_hooks=_plain_hook),
    "module with its own forward": _module(forward=lambda _: nn.functional.relu),
    "module with its own call": _module(_call_impl=lambda _: nn.functional.relu),
    "module with a foreign forward": _module(forward=_Hook),
    "module class called": _module_called,
    "jit.load called": _script_class,
    "torch.load called": _loaded_again,
    "method by a dotted name": _method,
    "module of a module": _renamed_module,
}
_STATE_REASON = "hooks|replaces its own|asks for what is not plain weights"

CASES = (
    *(Case(f"code by {opcode}", _by_opcode(opcode), REFUSED) for opcode in by_opcode(Path())),
    *(Case(f"code in {name}", _in_container(write), reason) for name, (write, reason) in CONTAINERS.items()),
    *(
        Case(f"code in {name}, protocol {protocol}", _in_protocol(CONTAINERS[name][0], protocol), CONTAINERS[name][1])
        for name in ("zip", "legacy", "bare")
        for protocol in range(6)
    ),
    *(Case(name, write, _STATE_REASON) for name, write in STATES.items()),
)
