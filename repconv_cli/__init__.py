"""repconv: fuse the branches of re-parameterizable networks into single convolutions, proven equal.

>>> from torch import nn
>>> import repconv_cli
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
>>> result = repconv_cli.inspect(model, input=(1, 3, 32, 32))
>>> result.totals.norms.before, result.totals.norms.after
(1, 0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "bench", "fuse", "inspect", "load", "verify"]

if TYPE_CHECKING:
    from repconv_cli.api import bench, fuse, inspect, load, verify


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which `repconv --help` must not.
    if name in __all__:
        from repconv_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'repconv_cli' has no attribute {name!r}")
