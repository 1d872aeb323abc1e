"""An ONNX file, parsed and checked. Parsing is protobuf's alone, and nothing in the file is executed by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repconv_cli.checkpoint.formats import open_regular, opens_onnx
from repconv_cli.checkpoint.hashing import digest_of
from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import DamagedFileError, InputError, RepconvError
from repconv_cli.onnx.external import extent_of, is_external
from repconv_cli.onnx.library import require
from repconv_cli.onnx.values import DTYPES, tensor_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

OLDEST_OPSET = 7
# A protobuf message cannot be larger; the tensors of a larger model lie beside it.
MOST_BYTES = 2**31 - 1
MOST_NODES = 200_000


@dataclass(frozen=True)
class OnnxFile:
    """A checked model: ``model`` holds no value that lies in another file; ``tensor`` reads those of either kind."""

    path: Path
    model: ModelProto
    sha256: str
    size_bytes: int

    @property
    def folder(self) -> Path:
        """Where the files beside it are."""
        return self.path.parent

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return next(int(entry.version) for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    def initializers(self) -> dict[str, TensorProto]:
        """Return the constants of the main graph by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def tensor(self, proto: TensorProto) -> Tensor | None:
        """Return the values of ``proto``; None where torch has no such element type."""
        return tensor_of(proto, self.folder)

    def has_external(self) -> bool:
        """Whether any tensor lies in another file."""
        return any(is_external(tensor) for tensor in tensors_in(self.model))


def is_onnx(path: str | Path) -> bool:
    """Whether the file is an ONNX model, by its first bytes; False for what cannot be read."""
    try:
        with open_regular(Path(path)) as handle:
            return opens_onnx(handle.read(64))
    except RepconvError:
        return False


def read_onnx(path: str | Path) -> OnnxFile:
    """Return the model in ``path``, with every claim checked that can be checked without running it.

    Raises:
        InputError: the libraries are missing, or the file is no model that can be worked on.
        DamagedFileError: it is cut short or contradicts itself.
        UnsafeFileError: its tensors lie outside of its folder.
    """
    require("onnx", "onnxruntime")
    named = Path(path)
    try:
        with open_regular(named) as handle, digest_of(handle) as digest:
            data = handle.read(MOST_BYTES + 1)
            if len(data) > MOST_BYTES:
                raise InputError("the file is larger than 2 GB, which no ONNX file can be")
            model = _parsed(data)
            _check(model)
            beside = _check_external(model, named.parent)
            return OnnxFile(named, model, digest.hexdigest(), len(data) + beside)
    except RepconvError as error:
        raise error.at(quoted(named, limit=200)) from None


def _parsed(data: bytes) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError, ValueError):
        if not opens_onnx(data[:64]):
            raise InputError("this is no ONNX model", needed="an .onnx file") from None
        raise DamagedFileError(
            "the ONNX model cannot be parsed: the file is cut short or damaged", hint="Download or export it again."
        ) from None
    return model


def _check(model: ModelProto) -> None:
    graph = model.graph
    if not graph.node or not graph.output:
        raise DamagedFileError("its graph has no operators or no outputs")
    if len(graph.node) > MOST_NODES:
        raise InputError(f"its graph has {len(graph.node):,} operators", needed=f"at most {MOST_NODES:,}")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise DamagedFileError(f"it names {len(versions)} versions of ONNX's operators", needed="one")
    if versions[0] < OLDEST_OPSET:
        raise InputError(
            f"its operators are of opset {versions[0]}",
            needed=f"{OLDEST_OPSET} or newer",
            hint="Convert it with onnx.version_converter.",
        )
    _check_order(graph)


def _check_order(graph: GraphProto) -> None:
    """Each value is made once, before it is read."""
    made = {tensor.name for tensor in graph.initializer} | {tensor.values.name for tensor in graph.sparse_initializer}
    made |= {value.name for value in graph.input}
    for node in graph.node:
        missing = [name for name in node.input if name and name not in made]
        if missing:
            raise DamagedFileError(f"operator {quoted(node.name or node.op_type)} reads {quoted(missing[0])} too early")
        outputs = [name for name in node.output if name]
        if len(set(outputs)) < len(outputs) or made.intersection(outputs):
            raise DamagedFileError(f"operator {quoted(node.name or node.op_type)} makes a value that exists already")
        made.update(outputs)
    lost = [value.name for value in graph.output if value.name not in made]
    if lost:
        raise DamagedFileError(f"nothing makes its output {quoted(lost[0])}")


def _check_external(model: ModelProto, folder: Path) -> int:
    """Return how many bytes lie in other files, after checking where."""
    total = 0
    for tensor in tensors_in(model):
        if not is_external(tensor):
            continue
        dtype = DTYPES.get(tensor.data_type)
        if dtype is None:
            raise InputError(f"tensor {quoted(tensor.name)}, of element type {tensor.data_type}, lies in another file")
        total += extent_of(tensor, folder, prod(tensor.dims) * dtype.itemsize).length
    return total


def tensors_in(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of the model: of the graph, of graphs inside it, of functions and of attributes."""
    yield from _tensors_of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _tensors_of_node(node)
    for training in model.training_info:
        yield from _tensors_of_graph(training.initialization)
        yield from _tensors_of_graph(training.algorithm)


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: Any) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            *attribute.sparse_tensors,
        ):
            yield from (sparse.values, sparse.indices)
    for graph in graphs_in(node):
        yield from _tensors_of_graph(graph)


def graphs_in(node: Any) -> Iterator[GraphProto]:
    """Yield the graphs that an operator holds: the branches of an ``If``, the body of a ``Loop``."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
