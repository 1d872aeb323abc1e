"""torch.export of a module, with as many sizes free as the model allows."""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from repconv_cli.errors import TraceError
from repconv_cli.graph.functional import is_renamable
from repconv_cli.graph.guards import Conditions, conditions
from repconv_cli.graph.kept import in_eval_mode

_MOST_SECONDS = 60
_TIED = "found conditions on them"


MayVary = tuple[tuple[bool, ...], ...] | None


@dataclass(frozen=True)
class Exported:
    """A functional graph, the conditions on its free sizes, and what to tell the user of those that are fixed.

    ``special`` are batches that the model tells from all others, by torch's own conditions.
    """

    program: ExportedProgram
    conditions: Conditions
    notes: tuple[str, ...] = ()
    special: frozenset[int] = frozenset()


def export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], may_vary: MayVary) -> Exported:
    """Return the graph with batch and space free where the model allows, else the batch alone, else none.

    Axes that have one size alone, such as the channels of tokens, leave the others free.
    """
    found: list[str] = []
    start = time.monotonic()
    error: BaseException | None = None
    special: frozenset[int] = frozenset()
    attempts = [(("space", "batch"), may_vary), (("batch",), may_vary), ((), may_vary)]
    while attempts:
        free, admitted = attempts.pop(0)
        if free == ("batch",) and special:
            continue
        try:
            exported = _exported(module, args, kwargs, free, admitted)
            needed = _conditions(exported) if free else Conditions()
            if not needed.tied:
                return Exported(_functional(exported), needed, _size_notes(free, found), special)
            found.append(_TIED)
            special = needed.special_batches()
            is_early = time.monotonic() - start < _MOST_SECONDS / 2
            fixed = needed.fixed() if is_early and "space" in free else set()
            narrower = _without(fixed, exported, args, kwargs, admitted)
            if narrower is not None:
                attempts.insert(0, (free, narrower))
        except _OverdueError:
            found.append(f"did not end within {_MOST_SECONDS} s while they were free")
        except Exception as failure:  # noqa: BLE001 - torch raises any kind from the user's forward
            error = failure
            found.append(f"failed while they were free ({_first_line(error)})")
    assert error is not None
    raise TraceError(
        f"torch.export cannot trace this model ({type(error).__name__}: {_first_line(error)})",
        hint="Give the shape that it takes with --input, or an --arch callable that returns a traceable part of it.",
    ) from error


def _without(
    fixed: set[tuple[str, int]],
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    may_vary: MayVary,
) -> MayVary:
    """Return what may vary but the axes ``fixed``; None where those are none, or leave no other axis in space."""
    leaves = pytree.tree_leaves((args, kwargs))
    names = exported.graph_signature.user_inputs
    admitted = _admitted(leaves, may_vary)
    narrower = tuple(
        tuple(is_free and (name, axis) not in fixed for axis, is_free in enumerate(row))
        for name, row in zip(names, admitted, strict=True)
    )
    free = [_free_dims(leaf, ("space",), row) for leaf, row in zip(leaves, narrower, strict=True)]
    return narrower if narrower != admitted and any(axis > 0 for dims in free for axis in dims or ()) else None


def _admitted(leaves: list[Any], may_vary: MayVary) -> tuple[tuple[bool, ...], ...]:
    return may_vary if may_vary is not None else tuple((True,) * 8 for _ in leaves)


def export_usual(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], may_vary: MayVary
) -> Exported | None:
    """Return the graph that holds for all batches but the special ones; None where torch ties it to anything else."""
    try:
        exported = _exported(module, args, kwargs, ("batch",), may_vary)
    except (_OverdueError, Exception):  # noqa: BLE001 - torch raises any kind from the user's forward
        # The caller has a graph of fixed sizes.
        return None
    needed = _conditions(exported)
    if not needed.is_free_but_for_batches():
        return None
    notes = _size_notes(("batch",), [_TIED])
    return Exported(_functional(exported), needed, notes, needed.special_batches())


def export_fixed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exported:
    """Return the graph with no size free."""
    return Exported(_functional(_exported(module, args, kwargs, (), None)), Conditions())


def _exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: tuple[str, ...], may_vary: MayVary
) -> ExportedProgram:
    shapes = _dynamic_shapes(module, args, kwargs, free, may_vary)
    with in_eval_mode(module), _deadline(_MOST_SECONDS if free else None):
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    return exported if is_renamable(exported.graph) else exported.run_decompositions({})


def _conditions(exported: ExportedProgram) -> Conditions:
    """Return the conditions under which the graph holds."""
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.name in names}
    examples = {
        (name, axis): size if isinstance(size, int) else size.node.hint
        for name, value in values.items()
        if isinstance(value, Tensor)
        for axis, size in enumerate(value.shape)
    }
    return conditions(getattr(exported, "_guards_code", None) or [], names, examples)


def _size_notes(free: tuple[str, ...], found: list[str]) -> tuple[str, ...]:
    if "space" in free:
        return ()
    sizes = "spatial sizes" if free else "batch and spatial sizes"
    return (f"{sizes} are fixed to the example's: torch.export {found[-1]}",)


class _OverdueError(BaseException):
    """Time is up. No ``Exception``, so that no handler in torch takes it for a failed guess."""


@contextmanager
def _deadline(seconds: int | None) -> Iterator[None]:
    """Raise :class:`_OverdueError` in the block after ``seconds``.

    Expressions of sizes can grow with each reshape until torch never ends. Only the main thread can be interrupted,
    and only where there are interval timers; elsewhere there is no limit.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def overdue(*_: object) -> None:
        raise _OverdueError

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, overdue)
    # Once more each second, should something on the way down swallow it.
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - start), 1e-6), interval)


def _dynamic_shapes(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: tuple[str, ...],
    may_vary: MayVary,
) -> dict[str, Any]:
    """Return the free sizes of each tensor by parameter name, nested as the arguments are."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    dims = [_free_dims(leaf, free, allowed) for leaf, allowed in zip(leaves, _admitted(leaves, may_vary), strict=True)]
    positional, named = pytree.tree_unflatten(dims, spec)
    signature = inspect.signature(module.forward)
    shapes: dict[str, Any] = {}
    for name, value in signature.bind(*positional, **named).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            shapes.update(value)
        else:
            shapes[name] = value
    return shapes


def _free_dims(leaf: Any, free: tuple[str, ...], allowed: tuple[bool, ...]) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.ndim or not free:
        return None
    dims = {0: Dim.AUTO}
    if "space" in free and leaf.is_floating_point() and leaf.ndim >= 3:
        dims |= dict.fromkeys(range(1 if leaf.ndim == 3 else 2, leaf.ndim), Dim.AUTO)
    return {axis: size for axis, size in dims.items() if leaf.shape[axis] > 1 and allowed[axis]}


def _first_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return "".join(c for c in text if c.isprintable())[:200]
