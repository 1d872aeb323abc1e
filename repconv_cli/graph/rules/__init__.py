"""One rule per ATen operator: how a node's term follows from the terms of the nodes it reads."""

from repconv_cli.graph.rules import convolutions, elementwise, layout
from repconv_cli.graph.rules.registry import RULES, Call, Step, aten, describe

__all__ = ["RULES", "Call", "Step", "aten", "convolutions", "describe", "elementwise", "layout"]
