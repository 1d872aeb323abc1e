"""Each block of a plan as ONNX nodes that read its anchor and give the value that it had."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from repconv_cli.graph.constants import Constants
from repconv_cli.graph.plan import Block
from repconv_cli.graph.rewrite import Fusion, fuse_block
from repconv_cli.onnx.arranging import arranged
from repconv_cli.onnx.call import shape_without_values
from repconv_cli.onnx.emit import WRITERS, Emitter, write_convolution
from repconv_cli.onnx.table import aten, same
from repconv_cli.onnx.translate import Translated

if TYPE_CHECKING:
    from onnx import NodeProto

_CONVOLUTIONS = {
    target for packet in (aten.conv1d, aten.conv2d, aten.conv3d) for target in (packet.default, packet.padding)
}


NameOf = Callable[[fx.Node], str]


class BlockWriter:
    """Writes the values of nodes: by their name in the file, by the block that they end, or operator by operator."""

    def __init__(
        self,
        translated: Translated,
        fusions: tuple[Fusion, ...],
        tensors: dict[str, Tensor],
        fresh: Callable[[str], str],
        store: Callable[[str, Tensor], str],
    ) -> None:
        self.translated = translated
        self.by_node = {fusion.block.node: fusion for fusion in fusions}
        self.touched = {translated.origins[node] for node in self.by_node}
        self.tensors = tensors
        self.constants = Constants(translated.program)
        self.fresh, self.store = fresh, store
        self.named: dict[fx.Node, str] = {
            node: name
            for name, node in translated.values.items()
            if translated.origins.get(node) not in self.touched or self._is_kept(node)
        }
        self.new: dict[str, str] = {}
        self.to = Emitter(translated.file.opset, "", fresh, store)

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether an operator that has a block among its outputs still gives this one as it did."""
        return node not in self.by_node and not any(self._is_changed(source, node) for source in node.all_input_nodes)

    def _is_changed(self, source: fx.Node, reader: fx.Node) -> bool:
        origins = self.translated.origins
        if origins.get(source) != origins.get(reader) or origins.get(source) is None:
            return False
        return source in self.by_node or any(self._is_changed(further, source) for further in source.all_input_nodes)

    def write(self, node: fx.Node, name: str) -> tuple[list[NodeProto], str]:
        """Return the nodes that give the value of ``node`` as ``name``, and the name that it has: another's, perhaps.

        The second is ``name`` unless the value is one that exists already.
        """
        self.to = Emitter(self.translated.file.opset, self._place(node), self.fresh, self.store)
        found = self.value(node)
        nodes = self.to.nodes
        if not nodes or found not in nodes[-1].output:
            return nodes, found
        nodes[-1].output[0] = name
        self.named[node] = name
        return nodes, name

    def _place(self, node: fx.Node) -> str:
        fusion = self.by_node.get(node)
        return fusion.block.name if fusion is not None else str(node.meta.get("module") or node.name)

    def value(self, node: fx.Node) -> str:
        """Return the name of a node's value, after writing what computes it where nothing in the file does."""
        if node in self.named:
            return self.named[node]
        fusion = self.by_node.get(node)
        if fusion is not None:
            found = self._fused(fusion)
        elif node in self.constants:
            value: Tensor = self.constants.value(node)
            found = self.store(f"{self.to.place}.constant", value.to(node.meta["dtype"]))
        else:
            found = self._call(node, self.value)
        self.named[node] = found
        return found

    def _fused(self, fusion: Fusion) -> str:
        """Write the operators of a block, as they were proved."""
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta = dict(fusion.block.anchor.meta)
        result = fusion.emit(graph, x)
        for node in graph.nodes:
            if node is not x:
                self._describe(node, fusion.block.anchor.meta["dtype"])
        anchor = fusion.block.anchor

        def name_of(node: fx.Node) -> str:
            if node is x:
                return self.value(anchor)
            if node.op == "get_attr":
                return self._new(str(node.target), fusion)
            return self._call(node, name_of, {x: anchor})

        return name_of(result)

    def _describe(self, node: fx.Node, dtype: torch.dtype) -> None:
        if node.op == "get_attr":
            tensor = self.tensors[str(node.target)]
            node.meta = {"shape": tuple(tensor.shape), "dtype": dtype, "free": (False,) * tensor.ndim}
            return
        shape, _ = shape_without_values(node.target, node.args, node.kwargs)
        source = next(s for s in node.all_input_nodes if s.op != "get_attr")
        sizes = list(zip(source.meta["shape"], source.meta["free"], strict=True))
        free = tuple(is_free for _, is_free in arranged(node.target, node.args[1:], sizes))
        node.meta = {"shape": shape, "dtype": dtype, "free": free}

    def _new(self, key: str, fusion: Fusion) -> str:
        """Return the name of a fused tensor, in the type of the values that it meets."""
        if key not in self.new:
            self.new[key] = self.store(key, self.tensors[key].to(fusion.block.anchor.meta["dtype"]))
        return self.new[key]

    def _call(self, node: fx.Node, name_of: NameOf, stands_for: dict[fx.Node, fx.Node] | None = None) -> str:
        if node.target in _CONVOLUTIONS:
            return self._convolution(node, name_of, stands_for or {})
        if node.target is aten.linear.default:
            return self._linear(node, name_of)
        args = map_arg(node.args, name_of)
        source = next((s for s in node.all_input_nodes if s.op != "get_attr"), None)
        return self.to.emit(node.target, args, dict(node.kwargs), source)

    def _convolution(self, node: fx.Node, name_of: NameOf, stands_for: dict[fx.Node, fx.Node]) -> str:
        """Write a convolution; ONNX's pads each side by itself, so zeros padded before it are its own."""
        x, weight, bias, strides, padding, dilations, group = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        kernel = list(weight.meta["shape"][2:])
        if padding == "same":
            totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]  # type: ignore[arg-type]
            pads = [[t // 2 for t in totals], [t - t // 2 for t in totals]]
        else:
            pads = [list(padding), list(padding)]  # type: ignore[arg-type]
        # A symmetric padding of the convolution's own lies around what was padded before: both are zeros.
        while (zeros := self._zeros_before(stands_for.get(x, x), len(kernel))) is not None:
            source, low, high = zeros
            pads = [_plus(pads[0], low), _plus(pads[1], high)]
            if x in stands_for:
                x, name_of = source, self.value
            else:
                x = source
        operands = [name_of(x)]
        operands += [self._weight(w, name_of, node) for w in (weight, bias) if isinstance(w, fx.Node)]
        options = (list(strides), list(dilations), int(group))  # type: ignore[arg-type]
        return write_convolution(self.to, operands, kernel, [*pads[0], *pads[1]], options)

    def _weight(self, node: fx.Node, name_of: NameOf, reader: fx.Node) -> str:
        fusion_name = name_of if node.graph is reader.graph else self.value
        return fusion_name(node)

    def _zeros_before(self, node: fx.Node, dims: int) -> tuple[fx.Node, list[int], list[int]] | None:
        """Return (what is padded, low, high) where ``node`` pads with zeros and has no name in the file."""
        if node in self.named or node in self.by_node or node.target is not aten.pad.default:
            return None
        source, widths = node.args[:2]
        mode = node.args[2] if len(node.args) > 2 else "constant"
        value = node.args[3] if len(node.args) > 3 else 0
        assert isinstance(source, fx.Node)
        sides: list[int] = list(widths)  # type: ignore[arg-type]
        if mode != "constant" or value or min(sides) < 0 or len(sides) != 2 * dims:
            return None
        return source, sides[::2][::-1], sides[1::2][::-1]

    def _linear(self, node: fx.Node, name_of: NameOf) -> str:
        """Write a linear layer: a Gemm on matrices, a product and a sum on anything else."""
        x, weight, bias = (*node.args, None)[:3]
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        operand = name_of(x)
        added = [name_of(bias)] if isinstance(bias, fx.Node) else []
        if len(x.meta["shape"]) == 2:
            return self.to.node("Gemm", [operand, name_of(weight), *added], transB=1)
        product = self.to.node("MatMul", [operand, self._transposed(weight, name_of)])
        return self.to.node("Add", [product, *added]) if added else product

    def _transposed(self, weight: fx.Node, name_of: NameOf) -> str:
        """Return the name of a matrix with its axes changed: a new one is stored that way."""
        key = str(weight.target)
        if weight.op != "get_attr" or key not in self.tensors or weight.graph is self.translated.program.graph:
            return self.to.node("Transpose", [name_of(weight)], perm=[1, 0])
        return self.store(key, self.tensors[key].t().to(weight.meta["dtype"]))


def _plus(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def is_worth(translated: Translated, block: Block) -> bool:
    """Whether ``block`` can be written in ONNX, and is less work there, or fewer nodes, than those that it replaces."""
    written = _nodes_written(block)
    if written is None:
        return False
    if block.after.macs < block.before.macs:
        return True
    gone = [node for node in (block.node, *block.freed) if node not in translated.constants]
    removed = {translated.origins[node] for node in gone}
    copies = {translated.origins[node] for node in gone if node.target is same}
    return written < len(removed - copies)


def _nodes_written(block: Block) -> int | None:
    """Return how many ONNX nodes :class:`BlockWriter` writes for ``block``, at most; None where it cannot."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    fusion = fuse_block(block)
    fusion.emit(graph, x)
    sizes = {x: list(zip(block.anchor.meta["shape"], block.anchor.meta["free"], strict=True))}
    count = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target not in WRITERS and node.target not in _CONVOLUTIONS and node.target is not aten.linear.default:
            return None
        before = next(sizes[source] for source in node.all_input_nodes if source in sizes)
        sizes[node] = arranged(node.target, node.args[1:], before)
        is_product = node.target is aten.linear.default and len(before) > 2
        count += 2 if is_product or node.target is aten.addcmul.default or node.kwargs.get("alpha", 1) != 1 else 1
        count -= node.target is aten.pad.default and "constant" in node.args
    return count
