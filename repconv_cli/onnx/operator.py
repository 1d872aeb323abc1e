"""ONNX operators that no ATen operator stands for: left as they are, and run by ONNX's reference where it can be.

The runs are for the float64 yardstick alone. They are not needed for a proof: a block never reaches across one.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repconv_cli.errors import NotRunnableError
from repconv_cli.onnx.values import DOUBLE, DOUBLED, from_numpy, to_numpy

if TYPE_CHECKING:
    from onnx import NodeProto
    from onnx.reference import ReferenceEvaluator

# Those that the reference computes on whole arrays, in any floating type. It loops over values for the others.
_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast
CastLike Ceil Celu Clip Concat ConcatFromSequence Constant ConstantOfShape Cos Cosh CumSum DepthToSpace Div Dropout
Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity InstanceNormalization
IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization MatMul Max Mean Min Mish Mod
Mul Neg NonZero Not OneHot Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape ReverseSequence Round RMSNormalization
ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceLength Shape Shrink Sigmoid Sign Sin Sinh Size
Slice Softmax Softplus Softsign SpaceToDepth Split SplitToSequence Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu
Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
_RUNNABLE = frozenset(_NAMES.split())
_FLATTENING = frozenset(["Softmax", "LogSoftmax", "Hardmax"])
# What they give depends on which of two values is larger: rounding alone may change it altogether.
CHOICES = frozenset(["TopK", "ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Unique", "Hardmax"])
RANDOM = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"]
)


class OnnxOperator:
    """One operator of the file, as something that a graph can call; ``pinned`` stands in for what it would give."""

    def __init__(self, node: NodeProto, opset: int) -> None:
        self.node = node
        self.opset = opset
        self.__name__ = node.op_type
        self.pinned: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        return self.__name__

    @property
    def is_runnable(self) -> bool:
        """Whether :meth:`__call__` computes anything."""
        return self.node.domain in ("", "ai.onnx") and self.node.op_type in _RUNNABLE

    @property
    def is_choice(self) -> bool:
        """Whether rounding may change its outputs altogether."""
        return self.node.domain in ("", "ai.onnx") and self.node.op_type in CHOICES

    def __call__(self, *operands: Any) -> Any:
        """Return its one output, or the tuple of them; operands that are left out are None."""
        if self.pinned is not None:
            return self.pinned[0] if len(self.pinned) == 1 else self.pinned
        if not self.is_runnable or self._flattens(operands):
            raise NotRunnableError(f"operator {self.__name__} cannot be run in float64")
        feed = {
            name: to_numpy(value)
            for name, value in zip(self.node.input, operands, strict=False)
            if name and value is not None
        }
        try:
            given = dict(zip(self._reference.output_names, self._reference.run(None, feed), strict=True))
            found = tuple(from_numpy(given[name]) if name else None for name in self.node.output)
        except Exception as error:
            raise NotRunnableError(f"operator {self.__name__} cannot be run in float64") from error
        return found[0] if len(found) == 1 else found

    def _flattens(self, operands: tuple[Any, ...]) -> bool:
        """Whether it joins the axes from its own on, as a softmax did before version 13; the reference does not."""
        if self.opset >= 13 or self.node.op_type not in _FLATTENING:
            return False
        axis = next((attribute.i for attribute in self.node.attribute if attribute.name == "axis"), 1)
        return bool(axis % operands[0].ndim != operands[0].ndim - 1)

    @cached_property
    def _reference(self) -> ReferenceEvaluator:
        """The operator alone as a model: of a node by itself, ONNX's reference runs the newest version there is."""
        import onnx
        from onnx.reference import ReferenceEvaluator

        names = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(filter(None, self.node.input))]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.node.output if name]
        graph = onnx.helper.make_graph([_doubled(self.node)], "operator", names, outputs)
        opset = onnx.helper.make_opsetid("", self.opset)
        return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))


def _doubled(node: NodeProto) -> NodeProto:
    """Return ``node`` with casts to a shorter floating type made casts to float64."""
    import onnx

    if node.op_type != "Cast":
        return node
    found = onnx.NodeProto()
    found.CopyFrom(node)
    for attribute in found.attribute:
        if attribute.name == "to" and attribute.i in DOUBLED:
            attribute.i = DOUBLE
    return found


class StoredTensor:
    """A tensor of the file that the caller may replace, so that it counts as no constant."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.__name__ = "stored"

    def __call__(self, *_: Any) -> Tensor:
        """Return it."""
        return self.value
