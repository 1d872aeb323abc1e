"""Random nets: as data, run and recorded, drawn, checked and shrunk."""

from tests.graph.nets import layers

__all__ = ["layers"]
