"""Small ONNX models made by hand, and both sides of a fuse run by onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import repconv_cli
from repconv_cli.results import Result

FLOAT = TensorProto.FLOAT
_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.int64): TensorProto.INT64}


class Graph:
    """A graph being made: each method returns the name of a value."""

    def __init__(
        self,
        shape: Sequence[int | str | None] = ("N", 4, 9, 8),
        opset: int = 17,
        dtype: Any = np.float32,
        seed: int = 0,
    ) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", _TYPES[self.dtype], list(shape))]
        self.channels = shape[1]

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def noise(self, *shape: int, name: str = "") -> str:
        return self.constant(self.random.normal(size=shape).astype(self.dtype), name)

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def node(
        self, op: str, *inputs: str, outputs: Sequence[str] | None = None, domain: str = "", **attributes: Any
    ) -> str:
        outputs = outputs or [f"v{len(self.nodes)}"]
        self.nodes.append(
            helper.make_node(op, list(inputs), list(outputs), f"n{len(self.nodes)}", domain=domain, **attributes)
        )
        return outputs[0]

    def conv(
        self, x: str, outputs: int = 4, inputs: int = 4, kernel: Sequence[int] = (3, 3), bias: bool = True, **more: Any
    ) -> str:
        group = more.get("group", 1)
        name = f"conv{len(self.nodes)}"
        operands = [x, self.noise(outputs, inputs // group, *kernel, name=f"{name}.weight")]
        if bias:
            operands.append(self.noise(outputs, name=f"{name}.bias"))
        if len(kernel) == 2 and kernel == (3, 3):
            more.setdefault("pads", [1, 1, 1, 1])
        return self.node("Conv", *operands, **more)

    def norm(self, x: str, channels: int = 4, **more: Any) -> str:
        """A batch norm with gamma negative in part, and one variance tiny."""
        name = f"norm{len(self.nodes)}"
        gamma = self.random.normal(size=channels)
        gamma[0] = -abs(gamma[0])
        variance = self.random.uniform(0.3, 2, size=channels)
        variance[-1] = 1e-3
        mean, beta = self.random.normal(size=(2, channels))
        values = {"weight": gamma, "bias": beta, "mean": mean, "var": variance}
        operands = [self.constant(v.astype(self.dtype), f"{name}.{key}") for key, v in values.items()]
        return self.node("BatchNormalization", x, *operands, epsilon=1e-3, **more)

    def model(self, *outputs: str, ir_version: int = 8, domains: Sequence[str] = ()) -> onnx.ModelProto:
        made = helper.make_graph(
            self.nodes,
            "hand made",
            self.inputs,
            [helper.make_tensor_value_info(name, _TYPES[self.dtype], None) for name in outputs],
            self.initializers,
            doc_string="a graph",
        )
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(made, opset_imports=imports, ir_version=ir_version, producer_name="tests")
        model.doc_string = "a model"
        helper.set_model_props(model, {"author": "tests", "licence": "none"})
        return model


def save(model: onnx.ModelProto, folder: Path, name: str = "in.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def external(model: onnx.ModelProto, folder: Path, location: str = "in.onnx.data") -> Path:
    path = folder / "in.onnx"
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=location, size_threshold=0
    )
    return path


def fuse(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[onnx.ModelProto, Result]:
    """Return the model that ``repconv fuse`` writes, and its report."""
    source, out = save(model, folder), folder / "out.onnx"
    result = repconv_cli.fuse(source, out, **options)
    return onnx.load(out), result


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


def assert_same(
    before: onnx.ModelProto, after: onnx.ModelProto, *shapes: Sequence[int], tolerance: float = 1e-5
) -> None:
    """Both models give the same at each of ``shapes``, up to the rounding of float32."""
    for shape in shapes:
        kind = helper.tensor_dtype_to_np_dtype(before.graph.input[0].type.tensor_type.elem_type)
        x = np.random.default_rng(7).normal(size=shape).astype(kind)
        expected, found = run(before, x), run(after, x)
        assert len(expected) == len(found)
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert np.abs(a.astype(np.float64) - b).max() <= tolerance * np.abs(a).max()


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator is in the graph, constants left out."""
    return dict(Counter(node.op_type for node in model.graph.node if node.op_type != "Constant"))
