"""The shape and type of every value: which sizes are fixed from what is declared, how large all are from one run.

Sizes that are written in the model (``value_info``) are not believed: a wrong one would be a wrong border. What is
fixed follows from the declared inputs by ONNX's own inference, and onnxruntime holds callers to those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repconv_cli.checkpoint.quoting import quoted
from repconv_cli.errors import InputError
from repconv_cli.graph.program import InputInfo
from repconv_cli.onnx.reading import OnnxFile
from repconv_cli.onnx.session import Session
from repconv_cli.onnx.values import DTYPES

if TYPE_CHECKING:
    from onnx import ModelProto, TypeProto

Shape = tuple[int, ...]
# Sizes that published models take, the usual one first.
_CANDIDATES = (224, 256, 640, 384, 64, 32, 512, 299, 128, 96, 16, 8)
_TAP = "repconv.shape."
_MOST_VALUES = 2**31
# What onnxruntime says of an operator that it does not have; whatever else it says, the model is wrong.
_NOT_KNOWN = ("NOT_IMPLEMENTED", "not a registered function/op", "No opset import for domain")


@dataclass(frozen=True)
class Known:
    """One value: its sizes at the example, which of them may vary, and its type."""

    shape: Shape
    free: tuple[bool, ...]
    dtype: torch.dtype


def declared_inputs(file: OnnxFile) -> list[Any]:
    """Return the graph's inputs without those that only give a constant its place (until IR version 3)."""
    constants = file.initializers()
    return [value for value in file.model.graph.input if value.name not in constants]


def overridable(file: OnnxFile) -> set[str]:
    """Return the names of constants that the caller may replace: they are none."""
    if file.model.ir_version < 4:
        return set()
    return {value.name for value in file.model.graph.input} & set(file.initializers())


@dataclass(frozen=True)
class Inference:
    """What is known of the values by name, the inputs, and whether onnxruntime runs the model."""

    known: dict[str, Known]
    inputs: tuple[InputInfo, ...]
    is_guessed: bool
    why_not_run: str | None = None


def infer(file: OnnxFile, given: tuple[Shape, ...]) -> Inference:
    """Return the shapes and types of all values, at the sizes ``given`` or at some that the model takes."""
    types = _types(file.model)
    inputs = [_input_info(value) for value in declared_inputs(file)]
    if not inputs:
        raise InputError("the model has no inputs")
    is_guessed = not given and any(size is None for info in inputs for size in info.shape[1:])
    tries = [_resized(inputs, given)] if given else _guesses(file, inputs)
    failure: InputError | None = None
    session: Session | None = None
    _check_memory(_inferred_sizes(file.model, tries[0]))
    try:
        names = _tensor_names(file.model, types)
        session = Session(_tapped(file.model, names), file.folder)
    except InputError as error:
        failure = error
    for infos in tries:
        if session is None:
            break
        try:
            sizes = _measured(session, names, infos)
        except InputError as error:
            failure = error
            continue
        return Inference(
            _joined(types, sizes, _same_for_any_batch(session, names, infos, sizes)), tuple(infos), is_guessed
        )
    if session is not None and given:
        assert failure is not None
        raise failure
    if session is not None and is_guessed:
        raise InputError("no size was found that the model takes", hint="Give it, such as --input 1,3,224,224.")
    assert failure is not None
    if not any(reason in failure.found for reason in _NOT_KNOWN):
        raise failure
    # onnxruntime has no such operator (one of a domain of its own): sizes by inference alone.
    infos = tries[0]
    return Inference(_joined(types, _inferred_sizes(file.model, infos)), tuple(infos), is_guessed, failure.found)


def _check_memory(sizes: dict[str, Shape]) -> None:
    """Raise where a value would be larger than any that a model of use has: a few bytes can ask for all memory."""
    for name, shape in sizes.items():
        if prod(shape) > _MOST_VALUES:
            raise InputError(f"its value {quoted(name)} would hold {prod(shape):,} numbers", needed=f"{_MOST_VALUES:,}")


def _input_info(value: Any) -> InputInfo:
    tensor = value.type.tensor_type
    dtype = DTYPES.get(tensor.elem_type)
    if value.type.WhichOneof("value") != "tensor_type" or dtype is None:
        raise InputError(f"its input {quoted(value.name)} is no tensor of numbers")
    if not tensor.HasField("shape"):
        raise InputError(f"its input {quoted(value.name)} has no declared number of axes")
    sizes = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    return InputInfo(value.name, sizes, tuple(size or 2 for size in sizes), dtype)


def _resized(inputs: list[InputInfo], given: tuple[Shape, ...]) -> list[InputInfo]:
    if len(given) != len(inputs):
        raise InputError(f"{len(given)} shapes given with --input", needed=f"{len(inputs)}, one for each input")
    found = []
    for info, shape in zip(inputs, given, strict=True):
        fits = len(shape) == len(info.shape) and all(
            own in (None, size) for own, size in zip(info.shape, shape, strict=True)
        )
        if not fits:
            free = ",".join("free" if size is None else str(size) for size in info.shape)
            raise InputError(
                f"--input {','.join(map(str, shape))} for input {quoted(info.name)}", needed=f"sizes {free}"
            )
        found.append(replace(info, example=shape))
    return found


def _guesses(file: OnnxFile, inputs: list[InputInfo]) -> list[list[InputInfo]]:
    """Return sizes to try: two samples, and the sizes of images; sizes of one name are the same."""
    names = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in declared_inputs(file)}
    batch = {params[0] for params in names.values() if params and params[0]}

    def size_of(info: InputInfo, axis: int, candidate: int) -> int:
        own = info.shape[axis]
        if own is not None:
            return own
        param = names[info.name][axis]
        return 2 if axis == 0 or (param and param in batch) else candidate

    if all(size is not None for info in inputs for size in info.shape[1:]):
        candidates: tuple[int, ...] = (2,)
    else:
        candidates = _CANDIDATES
    return [
        [replace(i, example=tuple(size_of(i, axis, candidate) for axis in range(len(i.shape)))) for i in inputs]
        for candidate in candidates
    ]


def _types(model: ModelProto) -> dict[str, TypeProto]:
    """Return the type of each value of the main graph, sizes as far as they follow from the declared inputs."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    declared = {value.name: value.type for value in bare.graph.value_info}
    for value in bare.graph.output:
        if value.type.WhichOneof("value") == "tensor_type":
            value.type.tensor_type.ClearField("shape")
    del bare.graph.value_info[:]
    try:
        found = onnx.shape_inference.infer_shapes(bare, check_type=False, strict_mode=False, data_prop=True)
    except Exception:  # noqa: BLE001 - inference of a graph that it does not understand may fail in any way
        found = bare
    types = {value.name: value.type for value in (*found.graph.input, *found.graph.value_info, *found.graph.output)}
    for name, type_ in declared.items():
        if name not in types:
            # What no inference knows (an operator of another domain) has at least the element type that is declared.
            if type_.WhichOneof("value") == "tensor_type":
                type_.tensor_type.ClearField("shape")
            types[name] = type_
    return types


def _tensor_names(model: ModelProto, types: dict[str, TypeProto]) -> list[str]:
    return [name for node in model.graph.node for name in node.output if name and _is_tensor(types.get(name))]


def _tapped(model: ModelProto, names: list[str]) -> ModelProto:
    """Return the model with the shapes of the tensors called ``names`` as its outputs, and no other."""
    import onnx

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    graph = tapped.graph
    del graph.output[:]
    for index, name in enumerate(names):
        graph.node.append(onnx.helper.make_node("Shape", [name], [f"{_TAP}{index}"]))
        graph.output.append(onnx.helper.make_tensor_value_info(f"{_TAP}{index}", onnx.TensorProto.INT64, None))
    return tapped


def _is_tensor(type_: TypeProto | None) -> bool:
    return type_ is not None and type_.WhichOneof("value") == "tensor_type"


def _measured(session: Session, names: list[str], infos: list[InputInfo]) -> dict[str, Shape]:
    found = session.run({info.name: _noise(info) for info in infos})
    shapes = {info.name: info.example for info in infos}
    return shapes | {name: tuple(shape.tolist()) for name, shape in zip(names, found, strict=True)}


def _same_for_any_batch(
    session: Session, names: list[str], infos: list[InputInfo], sizes: dict[str, Shape]
) -> dict[str, tuple[bool, ...]]:
    """Return which sizes stay when the batch changes, where nothing but the batch is free.

    Inference loses track behind a reshape to computed sizes; what two other batches leave alone is fixed.
    """
    if any(size is None for info in infos for size in info.shape[1:]):
        return {}
    same = {name: (True,) * len(shape) for name, shape in sizes.items()}
    for more in (1, 5):
        grown = [
            replace(i, example=(i.example[0] + more, *i.example[1:])) if i.shape[:1] == (None,) else i for i in infos
        ]
        try:
            others = _measured(session, names, grown)
        except InputError:
            return {}
        for name, shape in sizes.items():
            other = others[name]
            if len(other) == len(shape):
                same[name] = tuple(s and a == b for s, a, b in zip(same[name], shape, other, strict=True))
            else:
                same[name] = (False,) * len(shape)
    return same


def _noise(info: InputInfo) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if info.dtype.is_floating_point:
        return torch.randn(info.example, generator=generator).to(info.dtype)
    return torch.ones(info.example, dtype=info.dtype)


def _joined(
    types: dict[str, TypeProto], sizes: dict[str, Shape], same: dict[str, tuple[bool, ...]] | None = None
) -> dict[str, Known]:
    known = {}
    for name, type_ in types.items():
        dtype = DTYPES.get(type_.tensor_type.elem_type) if _is_tensor(type_) else None
        shape = sizes.get(name)
        if dtype is None or shape is None:
            continue
        dims = type_.tensor_type.shape.dim if type_.tensor_type.HasField("shape") else []
        is_ranked = len(dims) == len(shape)
        stays = (same or {}).get(name, (False,) * len(shape))
        free = tuple(
            not stays[axis] and not (is_ranked and dims[axis].dim_value == size) for axis, size in enumerate(shape)
        )
        known[name] = Known(shape, free, dtype)
    return known


def _inferred_sizes(model: ModelProto, infos: list[InputInfo]) -> dict[str, Shape]:
    """Return the sizes that follow from the example by inference alone."""
    import onnx

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    examples = {info.name: info.example for info in infos}
    for value in fixed.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, examples.get(value.name, ()), strict=False):
            dim.dim_value = size
    shapes = {}
    for name, type_ in _types(fixed).items():
        if _is_tensor(type_) and type_.tensor_type.HasField("shape"):
            dims = type_.tensor_type.shape.dim
            if all(dim.HasField("dim_value") for dim in dims):
                shapes[name] = tuple(dim.dim_value for dim in dims)
    return shapes
