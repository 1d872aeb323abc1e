"""The package's functions: paths or live modules in, results out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from repconv_cli import convert, gains
from repconv_cli.convert import load
from repconv_cli.errors import InputError
from repconv_cli.options import Options, Timing
from repconv_cli.results import Result

__all__ = ["bench", "fuse", "inspect", "load", "verify"]


def inspect(source: str | Path | nn.Module, **options: Any) -> Result:
    """Return what can be fused in ``source`` (a path or a live module), what cannot and why.

    Options are those of the command line, by their names: ``input=(1, 3, 224, 224)``, ``arch="file.py:make"`` …;
    or ``args=(x,)`` and ``kwargs={"mask": m}``, example inputs that the model is traced and compared with.
    """
    return convert.inspect(source, _options(options))


def fuse(
    source: str | Path | nn.Module, out: str | Path, *, force: bool = False, dry_run: bool = False, **options: Any
) -> Result:
    """Fuse ``source``, prove every block, and write ``out``; return what was done.

    Nothing is written unless every proof holds. Raises :class:`repconv_cli.errors.RepconvError`.
    """
    return convert.fuse(source, out, _options(options), force=force, dry_run=dry_run)


def verify(source: str | Path | nn.Module, out: str | Path, **options: Any) -> Result:
    """Judge the file at ``out`` against ``source``; ``result.verification`` is true unless they differ."""
    return convert.verify(source, out, _options(options))


def bench(
    source: str | Path | nn.Module, out: str | Path | None = None, *, timing: Timing | None = None, **options: Any
) -> Result:
    """Time ``source`` and the file at ``out`` (or ``source`` fused in memory) side by side; see ``result.bench``."""
    return gains.bench(source, out, _options(options), timing)


def _options(given: dict[str, Any]) -> Options:
    if "args" in given or "kwargs" in given:
        given["example"] = (tuple(given.pop("args", ())), dict(given.pop("kwargs", {})))
    shape = given.pop("input", ())
    shapes = (shape,) if isinstance(shape, (list, tuple)) and shape and isinstance(shape[0], int) else shape
    if not isinstance(shapes, (list, tuple)) or not all(map(_is_shape, shapes)):
        raise InputError(f"input={shape!r}"[:100], needed="a shape such as (1, 3, 224, 224), or several")
    return replace(Options(**given), input=tuple(tuple(s) for s in shapes))


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(n) is int and n > 0 for n in value)
