"""How large one tensor of a graph may be: a small file may not make the tool take much memory.

The file says how far a convolution pads, how much an upsampling grows and, for programs, what the input is; none of
that costs it a byte. So the limit follows the file's size, unless the user names the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from repconv_cli.errors import InputError
from repconv_cli.graph.borrowed import in_eval_mode, quiet
from repconv_cli.graph.program import Program
from repconv_cli.graph.sizes import propagate

UNASKED_ELEMENTS = 1 << 22
ASKED_ELEMENTS = 1 << 28
_PER_BYTE = 4


def most_elements(file_bytes: int | None, *, is_asked: bool) -> int:
    """Return the elements that one tensor may have: for a file of that size (None: no file), and if the user asked.

    >>> most_elements(65_000, is_asked=False)
    4454304
    """
    is_own = is_asked or file_bytes is None
    return (ASKED_ELEMENTS if is_own else UNASKED_ELEMENTS) + _PER_BYTE * (file_bytes or 0)


def require_within(shapes: Iterable[tuple[str, tuple[int, ...]]], most: int) -> None:
    """Check that no tensor has more than ``most`` elements.

    Raises:
        InputError: one has; it is named.
    """
    for name, shape in shapes:
        count = math.prod(shape)
        if count > most:
            raise InputError(
                f"{name!r} gives a tensor of {count:,} elements",
                needed=f"at most {most:,}",
                hint="Give a smaller input with --input; the limit is higher for a shape that you give.",
            )


def require_program_within(program: Program, most: int) -> None:
    """Check every tensor of a traced program at the traced sizes, as :func:`require_within`."""
    nodes = (node for node in program.graph.nodes if "shape" in node.meta)
    require_within(((node.meta.get("module") or node.name, node.meta["shape"]) for node in nodes), most)


def require_untraced_within(program: Program, inputs: list[tuple[int, ...]], most: int) -> None:
    """Check every tensor of a program that was read from a file and never traced, for inputs of these shapes.

    Raises:
        InputError: an operator does not take the shapes that it is given, or a tensor is too large.
    """
    found = propagate(program, inputs)
    if found is None:
        raise InputError("its graph cannot be run on the inputs that the source takes")
    require_within(((node.name, shape) for node, shape in found.shapes.items()), most)


def largest_tensor(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Return the elements of the largest tensor that ``module`` makes of an input, None if it does not take it.

    Shapes are computed on fake tensors, no numbers.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with in_eval_mode(module), torch.no_grad(), quiet(), fake, _Largest() as found:
            module(torch.empty(shape, dtype=dtype))
    except Exception:  # noqa: BLE001 - a forward may reject a shape in any way
        return None
    elements: int = found.elements
    return elements


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the size of the largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result
