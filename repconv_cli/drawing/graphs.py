"""The model's graph before and after, as plain data: what depends on the input, and which block it belongs to."""

from __future__ import annotations

from torch import fx

from repconv_cli.graph.plan import Plan
from repconv_cli.graph.program import Program, is_size
from repconv_cli.graph.rewrite import fuse_block, rewrite
from repconv_cli.results import NodeFacts


def nodes_before(plan: Plan) -> tuple[NodeFacts, ...]:
    """Return the graph as it was traced."""
    blocks = {node: index for index, block in enumerate(plan.blocks) for node in (block.node, *block.freed)}
    shapes = {key: tuple(tensor.shape) for key, tensor in plan.program.tensors.items()}
    return _nodes(plan.program, blocks, shapes)


def nodes_after(plan: Plan) -> tuple[NodeFacts, ...]:
    """Return the graph as it is written."""
    fusions = tuple(fuse_block(block) for block in plan.blocks)
    program = rewrite(plan, fusions)
    owner = {key: index for index, fusion in enumerate(fusions) for key in fusion.keys}
    shapes = {key: tuple(tensor.shape) for key, tensor in program.tensors.items()}
    shapes |= {key: shape for block in plan.blocks for key, shape in block.tensors.items()}
    blocks = {
        node: owner[str(source.target)]
        for node in program.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr" and str(source.target) in owner
    }
    return _nodes(program, blocks, shapes)


def _nodes(program: Program, blocks: dict[fx.Node, int], shapes: dict[str, tuple[int, ...]]) -> tuple[NodeFacts, ...]:
    places: dict[fx.Node, int] = {}
    found: list[NodeFacts] = []
    modules = _modules(program)
    for node in program.graph.nodes:
        inputs = tuple(places[source] for source in node.all_input_nodes if source in places)
        if is_size(node) or not (inputs or node.op == "placeholder"):
            continue
        places[node] = len(found)
        found.append(
            NodeFacts(
                name=node.name,
                op=_operator(node),
                module=modules.get(node, ""),
                shape=tuple(node.meta.get("shape", ())),
                weight=_weight(node, shapes),
                inputs=inputs,
                block=blocks.get(node),
            )
        )
    return tuple(found)


def _operator(node: fx.Node) -> str:
    if node.op != "call_function":
        return {"placeholder": "input"}.get(node.op, node.op)
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else str(getattr(node.target, "__name__", name))


def _weight(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the largest tensor that ``node`` reads, if it has more axes than a bias."""
    stored = [shapes.get(str(source.target), ()) for source in node.all_input_nodes if source.op == "get_attr"]
    return max((shape for shape in stored if len(shape) > 1), key=len, default=())


def _modules(program: Program) -> dict[fx.Node, str]:
    """Return each node's module path; where the graph knows none, that of the tensors it reads, or of its input."""
    own = {node: str(node.meta.get("module", "")) for node in program.graph.nodes}
    if any(own.values()):
        return own
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        keys = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
        earlier = [own[source] for source in node.all_input_nodes if source.op == "call_function"]
        paths = [key.rpartition(".")[0] for key in keys]
        own[node] = next(iter(paths), "") or next(iter(earlier), "")
    return own
