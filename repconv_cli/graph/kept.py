"""A module borrowed: run in eval mode and in silence, and given back as it was."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

from torch import nn


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every part of ``module`` in eval mode, and back as it was, with the attributes that it had.

    What lies in an attribute that is a dict, a list or a set is put back too.
    Some layers keep what they computed for the last input's size. Kept from a trace, that is no tensor but a symbol,
    which breaks whatever runs the module next.
    """
    before = [(part, dict(part.__dict__)) for part in module.modules()]
    held = [(value, copy(value)) for _, attributes in before for value in attributes.values() if type(value) in _HOLD]
    try:
        _to_eval_mode(module)
        yield
    finally:
        for part, attributes in before:
            part.__dict__.clear()
            part.__dict__.update(attributes)
        for holder, contents in held:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(contents)


def _to_eval_mode(module: nn.Module) -> None:
    try:
        module.eval()
    except Exception:  # noqa: BLE001 - what torch exported has no modes, and a user's own may raise anything
        for part in module.modules():
            part.training = False


_HOLD = (dict, list, set, OrderedDict)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no warning and no log record: what fails reaches the user as one error of ours.

    torch logs a traceback for each operator that it tries in vain.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
