"""One model for each rule: a block that is affine, and the operators that it must become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from tests.onnx.graphs import Graph


@dataclass(frozen=True)
class Case:
    """A model, what must be left of it, and the shapes to compare at."""

    make: Callable[[], ModelProto]
    left: dict[str, int]
    shapes: tuple[tuple[int, ...], ...] = ((2, 4, 9, 8), (1, 4, 9, 8))


CASES: dict[str, Case] = {}


def case(
    left: dict[str, int], *shapes: tuple[int, ...]
) -> Callable[[Callable[[], ModelProto]], Callable[[], ModelProto]]:
    def register(make: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
        CASES[make.__name__] = Case(make, left, shapes) if shapes else Case(make, left)
        return make

    return register


CONV = {"Conv": 1, "Relu": 1}


def finished(graph: Graph, y: str, **more: object) -> ModelProto:
    """The model that ends in an activation, so that the block is no output itself."""
    return graph.model(graph.node("Relu", y), **more)  # type: ignore[arg-type]


def repvgg(opset: int = 17, dtype: object = np.float32, **more: object) -> ModelProto:
    g = Graph(opset=opset, dtype=dtype)
    dense = g.norm(g.conv("x", bias=False))
    pointwise = g.norm(g.conv("x", kernel=(1, 1), bias=False))
    return finished(g, g.node("Add", g.node("Add", dense, pointwise), g.norm("x")), **more)


@case(CONV)
def three_branches() -> ModelProto:
    return repvgg()


@case(CONV)
def sum_of_many() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Sum", g.norm(g.conv("x")), g.conv("x", kernel=(1, 1)), "x", g.conv("x")))


@case({"Conv": 1, "Add": 1, "Relu": 2})
def sum_of_many_with_one_from_elsewhere() -> ModelProto:
    g = Graph()
    other = g.node("Relu", "x")
    return finished(g, g.node("Sum", g.norm(g.conv("x")), g.conv("x", kernel=(1, 1)), other))


@case(CONV)
def difference_and_negation() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Sub", g.node("Neg", g.norm(g.conv("x"))), g.conv("x", kernel=(1, 1))))


@case(CONV)
def scales() -> ModelProto:
    g = Graph()
    scaled = g.node("Mul", g.conv("x"), g.noise(4, 1, 1))
    shifted = g.node("Add", g.node("Div", scaled, g.noise(1, 4, 1, 1)), g.noise(1, 4, 1, 1))
    return finished(g, g.node("Mul", g.constant(np.float32(-0.3)), shifted))


@case(CONV)
def scale_before() -> ModelProto:
    g = Graph()
    return finished(g, g.conv(g.node("Mul", "x", g.noise(1, 4, 1, 1))))


@case(CONV)
def average_pool_that_counts() -> ModelProto:
    g = Graph()
    pooled = g.node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    return finished(g, g.node("Add", g.norm(pooled), g.conv("x")))


@case(CONV)
def pad_and_convolution_and_norm() -> ModelProto:
    g = Graph()
    padded = g.node("Pad", "x", g.integers(0, 0, 2, 0, 0, 0, 1, 1))
    return finished(g, g.norm(g.conv(padded, pads=[0, 0, 0, 0])))


@case(CONV)
def convolution_with_uneven_pads() -> ModelProto:
    g = Graph()
    branches = g.conv("x", pads=[0, 1, 2, 1]), g.conv("x", kernel=(1, 1), pads=[0, 0, 0, 0])
    return finished(g, g.node("Add", g.norm(branches[0]), g.norm(branches[1])))


@case({"Conv": 1, "Pad": 1, "Relu": 1})
def reflected_border() -> ModelProto:
    g = Graph()
    padded = g.node("Pad", "x", g.integers(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")
    branch = g.norm(g.conv(padded, pads=[0, 0, 0, 0]))
    return finished(g, g.node("Add", branch, g.conv("x", kernel=(1, 1))))


@case(CONV, (2, 4, 9, 8), (1, 4, 10, 7))
def same_padding_of_even_kernel() -> ModelProto:
    g = Graph(("N", 4, "H", "W"))
    return finished(g, g.norm(g.conv("x", kernel=(4, 2), auto_pad="SAME_UPPER")))


@case(CONV)
def same_padding_with_stride() -> ModelProto:
    g = Graph()
    return finished(g, g.norm(g.conv("x", kernel=(3, 3), auto_pad="SAME_LOWER", strides=[2, 2], pads=None)))


@case(CONV)
def grouped_with_identity() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Add", g.norm(g.conv("x", group=2)), "x"))


@case(CONV)
def dilated_with_stride() -> ModelProto:
    g = Graph()
    dilated = g.conv("x", pads=[2, 2, 2, 2], dilations=[2, 2], strides=[2, 2])
    return finished(g, g.node("Add", g.norm(dilated), g.conv("x", kernel=(1, 1), strides=[2, 2])))


@case({"ConvTranspose": 1, "Relu": 1})
def transposed_and_norm() -> ModelProto:
    g = Graph()
    weight = g.noise(4, 3, 3, 3)
    up = g.node("ConvTranspose", "x", weight, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    return finished(g, g.norm(up, 3))


@case(CONV)
def concatenated_branches() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Concat", g.norm(g.conv("x", 3), 3), g.conv("x", 5), axis=1))


@case(CONV)
def sliced_channels() -> ModelProto:
    g = Graph()
    y = g.node("Slice", g.norm(g.conv("x", 8), 8), g.integers(2), g.integers(6), g.integers(1))
    return finished(g, y)


@case(CONV)
def split_and_put_together_in_another_order() -> ModelProto:
    g = Graph(opset=13)
    g.node("Split", g.norm(g.conv("x", 8), 8), g.integers(2, 6), outputs=["a", "b"], axis=1)
    return finished(g, g.node("Concat", "b", g.node("Neg", "a"), axis=1))


@case({"Conv": 3, "Split": 1, "Relu": 2})
def split_before_padded_convolutions() -> ModelProto:
    g = Graph(opset=13)
    g.node("Split", g.norm(g.conv("x", 8), 8), g.integers(2, 6), outputs=["a", "b"], axis=1)
    a, b = g.conv("a", 4, 2), g.conv("b", 4, 6, (1, 1))
    return g.model(g.node("Relu", a), g.node("Relu", b))


@case({"Gemm": 1, "Relu": 1}, (3, 6), (1, 6))
def products_in_a_row() -> ModelProto:
    g = Graph(("N", 6))
    first = g.node("Gemm", "x", g.noise(5, 6), g.noise(5), transB=1)
    second = g.node("Gemm", first, g.noise(5, 4), g.noise(1, 4), alpha=0.5, beta=2.0)
    return finished(g, g.norm(second))


@case({"MatMul": 1, "Add": 1, "Relu": 1}, (2, 7, 6))
def tokens_scaled() -> ModelProto:
    g = Graph(("N", 7, 6))
    y = g.node("Add", g.node("MatMul", "x", g.noise(6, 5)), g.noise(5))
    return finished(g, g.node("Add", g.node("Mul", y, g.noise(5)), g.noise(5)))


@case(CONV)
def identities_and_dropout() -> ModelProto:
    g = Graph()
    y = g.node("Dropout", g.node("Identity", g.conv("x")))
    return finished(g, g.norm(g.node("Cast", y, to=1)))


@case({"Conv": 1, "Relu": 1}, (2, 4, 12), (1, 4, 9))
def one_axis() -> ModelProto:
    g = Graph(("N", 4, "L"))
    return finished(g, g.node("Add", g.norm(g.conv("x", kernel=(5,), pads=[2, 2])), g.norm("x")))


@case({"Conv": 1, "Relu": 1}, (1, 4, 4, 5, 6))
def three_axes() -> ModelProto:
    g = Graph((1, 4, 4, 5, 6))
    wide = g.conv("x", kernel=(3, 1, 3), pads=[1, 0, 1, 1, 0, 1])
    return finished(g, g.node("Add", g.norm(wide), g.conv("x", kernel=(1, 1, 1))))


@case(CONV)
def constants_computed_from_constants() -> ModelProto:
    g = Graph()
    weight = g.node("Mul", g.noise(4, 4, 3, 3), g.node("Sqrt", g.node("Abs", g.noise(4, 1, 1, 1))))
    shape = g.node("Shape", weight)
    zero = g.node("Expand", g.constant(np.float32(0.5)), g.node("Gather", shape, g.integers(0)))
    return finished(g, g.norm(g.node("Conv", "x", weight, zero, pads=[1, 1, 1, 1])))


@case({"Conv": 2, "Relu": 1})
def biased_pointwise_before_padding_stays_apart() -> ModelProto:
    g = Graph()
    return finished(g, g.conv(g.norm(g.conv("x", kernel=(1, 1)))))


@case({"Conv": 1, "Relu": 1}, (2, 4, 8, 8), (1, 4, 12, 9))
def free_height_and_width() -> ModelProto:
    g = Graph(("N", 4, "H", "W"))
    strided = g.conv("x", strides=[2, 2]), g.conv("x", kernel=(1, 1), strides=[2, 2])
    return finished(g, g.node("Add", g.norm(strided[0]), g.norm(strided[1])))


@case({"Mul": 1, "Add": 1, "Relu": 1})
def scale_and_shift() -> ModelProto:
    g = Graph()
    scaled = g.node("Mul", g.node("Mul", "x", g.noise(4, 1, 1)), g.noise(4, 1, 1))
    return finished(g, g.node("Sub", g.node("Add", scaled, g.noise(4, 1, 1)), g.noise(4, 1, 1)))


@case({"Mul": 1, "Relu": 1})
def two_scales() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Mul", g.node("Div", "x", g.noise(4, 1, 1)), g.noise(4, 1, 1)))


@case({"Add": 1, "Relu": 1})
def two_shifts() -> ModelProto:
    g = Graph()
    return finished(g, g.node("Sub", g.node("Add", "x", g.noise(4, 1, 1)), g.noise(4, 1, 1)))


@case({"Relu": 1})
def two_scales_that_cancel() -> ModelProto:
    g = Graph()
    powers = g.constant(np.float32([1, -2, 4, 0.5]).reshape(4, 1, 1))
    return finished(g, g.node("Div", g.node("Mul", "x", powers), powers))


@case({"MatMul": 1, "Add": 1, "Reshape": 1, "Relu": 1}, (2, 7, 6), (1, 7, 6))
def norm_over_tokens_before_heads() -> ModelProto:
    g = Graph(("N", 7, 6))
    rows = g.node("Reshape", g.node("MatMul", "x", g.noise(6, 8)), g.integers(-1, 8))
    return finished(g, g.node("Reshape", g.norm(rows, 8), g.integers(-1, 7, 2, 4)))


@case({"MatMul": 1, "Add": 1, "Reshape": 1, "Relu": 1}, (3, 7, 6))
def norm_over_tokens_before_heads_of_known_sizes() -> ModelProto:
    g = Graph((3, 7, 6))
    rows = g.node("Reshape", g.node("MatMul", "x", g.noise(6, 8)), g.integers(21, 8))
    return finished(g, g.node("Reshape", g.norm(rows, 8), g.integers(3, 7, 2, 4)))


@case({"Reshape": 2, "Gemm": 1, "Relu": 1}, (2, 4, 3, 5), (1, 4, 3, 5))
def layer_over_the_whole_image_beside_convolutions() -> ModelProto:
    g = Graph(("N", 4, 3, 5))
    full = g.node("Gemm", g.node("Flatten", "x"), g.noise(60, 60), g.noise(60), transB=1)
    image = g.node("Reshape", full, g.integers(-1, 4, 3, 5))
    return finished(g, g.node("Add", g.node("Add", image, g.norm(g.conv("x"))), g.norm(g.conv("x", kernel=(1, 1)))))
