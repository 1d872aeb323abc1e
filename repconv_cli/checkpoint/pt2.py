"""torch.export programs read without torch.export: the archive, the graph's JSON, and the raw bytes of its tensors.

torch's own loader unpickles members and evaluates text from the file. Here no member is ever unpickled: the sample
inputs, which are a pickle, stay unread, and an archive that needs any other pickle is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

from repconv_cli.checkpoint import pt2_schema as schema
from repconv_cli.checkpoint.archive import Archive
from repconv_cli.checkpoint.program import ProgramFile
from repconv_cli.checkpoint.pt2_arguments import MOST_JSON_BYTES, decoded, nesting, range_of, shape, size
from repconv_cli.checkpoint.pt2_graph import GraphReader, inputs_of
from repconv_cli.checkpoint.pt2_tensors import read_tensors
from repconv_cli.checkpoint.quoting import listed, quoted
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError

__all__ = ["ProgramFile", "read_program"]

_AGAIN = "Export and save it again with torch 2.9 or newer."


def read_program(handle: BinaryIO) -> ProgramFile:
    """Return the program in an open ``.pt2`` file.

    Raises:
        UnsafeFileError: a weight or constant is a pickle, or an opaque object.
        DamagedFileError: the archive or the graph contradicts itself, or a tensor claims bytes that are not there.
        InputError: the program uses something outside of the schema (sub-graphs, custom objects, compiled code),
            or was written by another version of it.
    """
    archive = Archive(handle)
    folder = _folder(archive)
    text = archive.read(f"{folder}models/model.json", MOST_JSON_BYTES)
    program: schema.Program = decoded(text, schema.Program, "its graph")
    if program.schema_version.major != schema.MAJOR_VERSION:
        found = f"its graph has schema version {program.schema_version.major}"
        raise InputError(found, needed=f"version {schema.MAJOR_VERSION}", hint=_AGAIN)
    tensors = read_tensors(archive, folder)
    graph, signature = program.graph_module.graph, program.graph_module.signature
    if graph.custom_obj_values:
        raise UnsafeFileError(f"its graph uses opaque objects: {listed(graph.custom_obj_values)}")
    shapes = {name: shape(name, meta) for name, meta in graph.tensor_values.items()}
    inputs = inputs_of(graph, signature, tensors, shapes)
    reader = GraphReader(inputs)
    nodes = tuple(reader.node(node) for node in graph.nodes)
    outputs, updates = reader.outputs(graph, signature)
    call = _root_call(program.graph_module.module_call_graph)
    return ProgramFile(
        inputs=inputs,
        nodes=nodes,
        outputs=outputs,
        buffer_updates=updates,
        tensors=tensors,
        shapes=shapes,
        size_values={name: size(value) for name, value in graph.sym_int_values.items()},
        ranges=dict(range_of(name, limits) for name, limits in program.range_constraints.items()),
        in_spec=nesting(call.in_spec),
        out_spec=nesting(call.out_spec),
        argument_names=tuple(call.forward_arg_names or ()),
        torch_version=quoted(program.torch_version),
    )


def _folder(archive: Archive) -> str:
    names = archive.names()
    models = [name for name in names if "/models/" in f"/{name}" and name.endswith(".json")]
    if len(models) != 1 or not models[0].endswith("models/model.json"):
        raise InputError(f"the archive holds the models {listed(models) or 'none'}", needed="one, called model")
    folder = models[0].removesuffix("models/model.json")
    _refuse(names, f"{folder}data/aotinductor/", "compiled code")
    # Older versions kept all weights in one pickle.
    pickled = [f"{folder}data/{kind}/model.pt" for kind in ("weights", "constants")]
    _refuse(names, tuple(pickled), "pickled weights")
    if f"{folder}archive_format" not in archive or archive.read(f"{folder}archive_format", 64).strip() != b"pt2":
        raise InputError("the archive does not say that it is a pt2 archive", hint=_AGAIN)
    if f"{folder}byteorder" in archive and archive.read(f"{folder}byteorder", 64).strip() != b"little":
        raise InputError("its tensors are stored big-endian", hint="Export it on a little-endian machine.")
    return folder


def _refuse(names: Iterable[str], start: str | tuple[str, ...], what: str) -> None:
    found = [name for name in names if name.startswith(start)]
    if found:
        raise UnsafeFileError(f"the archive holds {what}: {listed(found)}", hint=_AGAIN)


def _root_call(entries: list[schema.CallEntry]) -> schema.CallSignature:
    for entry in entries:
        if entry.fqn == "" and entry.signature is not None:
            return entry.signature
    raise DamagedFileError("it does not say how the model is called", hint=_AGAIN)
