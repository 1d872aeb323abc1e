"""How much memory a graph may take: a small file may not ask for much.

The file says how far a convolution pads, how much an upsampling grows and, for programs, what the input is; none of
that costs it a byte. So the limit follows the file's size, unless the user names the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from repconv_cli.errors import InputError
from repconv_cli.graph.constants import Constants
from repconv_cli.graph.kept import in_eval_mode, quiet
from repconv_cli.graph.program import InputInfo, Program
from repconv_cli.graph.sizes import propagate

UNASKED_ELEMENTS = 1 << 23
ASKED_ELEMENTS = 1 << 29
_PER_BYTE = 4
Shape = tuple[int, ...]


def most_elements(file_bytes: int | None, *, is_asked: bool) -> int:
    """Return the elements that all tensors of a graph may have that are in use at one time, weights left out.

    ``file_bytes`` is the size of the model's file (None: no file), ``is_asked`` whether the user named the input.

    >>> most_elements(65_000, is_asked=False)
    8648608
    """
    is_own = is_asked or file_bytes is None
    return (ASKED_ELEMENTS if is_own else UNASKED_ELEMENTS) + _PER_BYTE * (file_bytes or 0)


def require_within(name: str, elements: int, most: int) -> None:
    """Check that what is called ``name`` takes no more than ``most`` elements.

    Raises:
        InputError: it does.
    """
    if elements > most:
        raise InputError(
            f"{name} needs memory for {elements:,} elements",
            needed=f"at most {most:,}",
            hint="Give a smaller input with --input; the limit is higher for a shape that you give.",
        )


def require_inputs_within(infos: tuple[InputInfo, ...], most: int) -> None:
    """Check the inputs that a model is to be traced with, as :func:`require_within`."""
    require_within("its input", sum(math.prod(info.example) for info in infos), most)


def require_program_within(program: Program, most: int) -> None:
    """Check what a traced program has in use at one time, as :func:`require_within`."""
    elements, name = _most_in_use(program, lambda node: node.meta.get("shape"))
    require_within(name, elements, most)


def require_like(program: Program, stored: Program) -> None:
    """Check that a program from a file can be run on the inputs of a traced one, in about as much memory.

    Raises:
        InputError: an operator does not take the shapes that it is given, or they take too much memory.
    """
    found = propagate(stored, [info.example for info in program.inputs])
    if found is None:
        raise InputError("its graph cannot be run on the inputs that the source takes")
    own, _ = _most_in_use(program, lambda node: node.meta.get("shape"))
    elements, name = _most_in_use(stored, found.shapes.get)
    require_within(name, elements, UNASKED_ELEMENTS + 2 * own)


def _most_in_use(program: Program, shape_of: Callable[[fx.Node], Shape | None]) -> tuple[int, str]:
    """Return the most elements in use after any node, and its name.

    Values are dropped after their last use, constants are kept.
    """
    constants = Constants(program)
    last_use = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    live, sizes, most = 0, dict[fx.Node, int](), (0, "the model")
    for node in program.graph.nodes:
        shape = None if node.op == "get_attr" else shape_of(node)
        if shape is not None:
            sizes[node] = math.prod(shape)
            live += sizes[node]
            most = max(most, (live, node.meta.get("module") or node.name))
        for source in {node, *node.all_input_nodes}:
            if last_use.get(source, node) is node and source not in constants:
                live -= sizes.pop(source, 0)
    return most


def largest_tensor(module: nn.Module, shape: Shape, dtype: torch.dtype, keyword: str | None = None) -> int | None:
    """Return the elements of the largest tensor that ``module`` makes of an input, None if it does not take it.

    Shapes are computed on fake tensors, no numbers.
    """
    # Half a second, and only a model without a known input comes here.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # A number that is read from a tensor, such as a detector's stride, is a symbol; sizes are not.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    try:
        with in_eval_mode(module), torch.no_grad(), quiet(), fake, _Largest() as found:
            value = torch.empty(shape, dtype=dtype)
            module(value) if keyword is None else module(**{keyword: value})
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
