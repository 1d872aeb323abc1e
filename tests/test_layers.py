"""The house of DESIGN §8: who may import whom, and what no module may hold."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repconv_cli

ROOT = Path(repconv_cli.__file__).parent
MODULES = {
    ".".join(("repconv_cli", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

# Each room, and the rooms it may import from besides itself.
MAY_IMPORT = {
    "errors": set(),
    "quantities": set(),
    "allocation": set(),
    "threads": set(),
    "finite": set(),
    "memory": {"allocation"},
    "results": set(),
    "options": set(),
    "algebra": {"errors"},
    "graph": {"algebra", "allocation", "errors", "finite", "memory"},
    "checkpoint": {"errors", "finite", "quantities"},
    "onnx": {"algebra", "checkpoint", "graph", "errors"},
    "exported": {"checkpoint", "graph", "errors"},
    "facts": {"graph", "results"},
    "drawing": {"algebra", "errors", "facts", "graph", "results"},
    "diagnosis": {"graph", "results"},
    "clock": set(),
    "folding": {"checkpoint", "drawing", "errors", "facts", "graph", "results"},
    "by_family": {"checkpoint", "clock", "errors", "finite", "folding", "results"},
    "made": {"opening", "outputs", "results"},
    "alone": {
        "by_family", "checkpoint", "clock", "diagnosis", "errors", "graph", "made", "memory", "opening", "options",
        "results",
    },
    "full": {
        "allocation", "clock", "diagnosis", "drawing", "errors", "facts", "graph", "made", "opening", "options",
        "outputs", "results", "verdict",
    },
    "deploy": {
        "alone", "by_family", "checkpoint", "clock", "drawing", "errors", "facts", "full", "graph", "made", "opening",
        "options", "outputs", "results", "verdict",
    },
    "verify": {"graph", "onnx", "results", "errors"},
    "verdict": {"graph", "onnx", "options", "results", "errors"},
    "opening": {"checkpoint", "errors", "exported", "graph", "onnx", "options", "results"},
    "timing": {"graph", "onnx", "results", "errors"},
    "gains": {"clock", "full", "errors", "facts", "graph", "opening", "options", "results", "timing", "verdict"},
    "training": {"algebra", "errors"},
    "contents": {"checkpoint", "options", "results"},
    "outputs": {"checkpoint", "errors", "exported", "graph", "onnx", "opening", "options", "verdict"},
    "convert_onnx": {
        "checkpoint", "clock", "drawing", "errors", "facts", "graph", "onnx", "options", "results", "verdict",
    },
    "convert": {
        "alone", "checkpoint", "clock", "contents", "convert_onnx", "deploy", "drawing", "errors", "facts", "full",
        "graph", "made", "onnx", "opening", "options", "outputs", "results", "verdict",
    },
    "api": {"convert", "errors", "gains", "options", "results"},
    "report": {"errors", "quantities", "results"},
    "cli": {
        "allocation", "checkpoint", "contents", "convert", "gains", "errors", "options", "report", "results", "threads",
    },
    "__init__": {"api"},
    "__main__": {"cli"},
}  # fmt: skip

# What each room may import from outside, besides the standard library.
THIRD_PARTY = {
    "errors": set(),
    "quantities": set(),
    "allocation": set(),
    "threads": set(),
    "results": set(),
    "options": set(),
    "algebra": {"torch"},
    "finite": {"torch"},
    "memory": {"numpy", "torch"},
    "graph": {"torch", "msgspec"},
    "onnx": {"torch", "numpy", "onnx", "onnxruntime", "google"},
    "checkpoint": {"numpy", "torch", "msgspec", "safetensors"},
    "report": {"rich", "jinja2", "markupsafe", "msgspec"},
    "cli": {"typer", "rich"},
    "training": {"torch"},
}


def room_of(module: str) -> str:
    """Return the part of a name that tells the room: ``graph`` of ``repconv_cli.graph.plan``.

    The version, a constant of the package itself, is in no room.
    """
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a source imports, wherever in it; ``from package import module`` gives the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def is_version(tree: ast.AST, module: str) -> bool:
    """Whether ``repconv_cli`` itself is imported for its version alone."""
    named = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
        if f"{module}.{alias.name}" not in MODULES
    ]
    return module == "repconv_cli" and named == ["__version__"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rooms_below_its_own(module: str) -> None:
    room = room_of(module)
    assert room in MAY_IMPORT, f"DESIGN §8 has no room {room!r}"
    allowed = MAY_IMPORT[room] | {room}
    ours = {name for name in imports_of(TREES[module]) if name.split(".")[0] == "repconv_cli"}
    wrong = {name for name in ours if room_of(name) not in allowed and not is_version(TREES[module], name)}
    assert not wrong, f"{module} (room {room}) imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in THIRD_PARTY])
def test_a_room_imports_no_library_but_its_own(module: str) -> None:
    found = {name.split(".")[0] for name in imports_of(TREES[module])}
    assert found - set(sys.stdlib_module_names) - {"repconv_cli"} <= THIRD_PARTY[room_of(module)]


def test_there_is_no_import_cycle_not_even_inside_functions() -> None:
    graph = {
        module: {name for name in imports_of(_without_type_checking(tree)) if name in MODULES and name != module}
        for module, tree in TREES.items()
        # The package's own lazy access to its functions is the one way back up.
        if module != "repconv_cli"
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' → '.join(error.args[1])}")


def _without_type_checking(tree: ast.Module) -> ast.Module:
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return ast.Module(body=kept, type_ignores=[])


def test_each_light_room_imports_without_torch() -> None:
    rooms = ["errors", "results", "report", "cli", "checkpoint", "contents"]
    light = [name for name in MODULES if room_of(name) in rooms and not _needs_torch(TREES[name])]
    assert {"repconv_cli.cli.main", "repconv_cli.report.terminal", "repconv_cli.checkpoint.formats"} <= set(light)
    code = f"import sys, importlib\nfor m in {light!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def _needs_torch(tree: ast.Module) -> bool:
    direct = [name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for name in imports_of(node)]
    return any(
        name.split(".")[0] == "torch"
        or (name in MODULES and room_of(name) == "checkpoint" and _needs_torch(TREES[name]))
        for name in direct
    )


@pytest.mark.parametrize("room", ["report", "cli", "results", "errors"])
def test_a_room_above_the_use_cases_names_torch_nowhere(room: str) -> None:
    for module, tree in TREES.items():
        if room_of(module) == room:
            assert "torch" not in {name.split(".")[0] for name in imports_of(tree)}, module


def test_the_package_gives_exactly_these_names() -> None:
    assert sorted(repconv_cli.__all__) == ["__version__", "bench", "fuse", "inspect", "load", "verify"]


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_a_drawer_for_everything(module: str) -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc"}
    assert not set(module.strip("_").split(".")) & drawers


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_class_tells_what_it_is(module: str) -> None:
    assert ast.get_docstring(TREES[module]), f"{module} has no docstring"
    assert undocumented(TREES[module]) == []


def undocumented(tree: ast.Module) -> list[str]:
    """Return the public functions, classes and methods without a docstring."""
    found = []
    public = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in (node for node in public if not node.name.startswith("_")):
        methods = node.body if isinstance(node, ast.ClassDef) else []
        named = [m for m in methods if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
        found += [f"{node.name}:{part.name}" for part in (node, *named) if not ast.get_docstring(part)]
    return found


CALLS = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "Unpickler", "find_class"}
ATTRIBUTES = {
    ("jit", "load"), ("export", "load"), ("pickle", "load"), ("pickle", "loads"), ("torch", "load"),
    ("dill", "load"), ("joblib", "load"), ("marshal", "loads"), ("os", "system"), ("os", "popen"),
    ("serialization", "load"),
}  # fmt: skip
# Keywords that only a loader of pickles has, and names that only one has after ``from torch import``.
KEYWORDS = {"weights_only", "allow_pickle", "pickle_module"}
LOADERS = {("torch", "load"), ("torch.jit", "load"), ("torch.export", "load"), ("torch.serialization", "load")}
RUNNERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "subprocess", "runpy", "sympy", "joblib"}


def runs_code(tree: ast.AST) -> list[str]:
    """Return what in a source could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS:
            found.append(node.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            # A module's own eval() and a regular expression's compile() run nothing.
            is_call = node.attr in CALLS and (owner == "builtins" or node.attr not in ("eval", "compile"))
            if (owner, node.attr) in ATTRIBUTES or is_call:
                found.append(f"{owner}.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS and ast.unparse(node) != "allow_pickle=False":
            found.append(node.arg)
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if (node.module, alias.name) in LOADERS]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [name for name in imports_of(node) if name.split(".")[0] in RUNNERS]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_in_the_package_can_run_what_a_file_says(module: str) -> None:
    assert runs_code(TREES[module]) == []


@pytest.mark.parametrize(
    "text",
    [
        "eval(t)", "exec(t)", "x = eval", "import pickle", "from pickle import loads", "pickle.load(f)",
        "torch.load(p, weights_only=False)", "torch.jit.load(p)", "torch.export.load(p)", "load(p, weights_only=True)",
        "from torch import load", "from torch.jit import load as f", "torch.serialization.load(p)", "builtins.eval(t)",
        "numpy.load(p, allow_pickle=True)", "sympy.sympify(t)", "from sympy import sympify", "import sympy as s",
    ],
)  # fmt: skip
def test_the_check_above_finds_each_way_to_run_code(text: str) -> None:
    assert runs_code(ast.parse(text)) != []


# The only places that import what has a name at run time: classes of admitted packages, and what --arch names.
IMPORT_BY_NAME = {f"repconv_cli.checkpoint.{name}" for name in ("rebuild", "architectures", "importing")}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in IMPORT_BY_NAME | {"repconv_cli"}])
def test_nothing_else_imports_by_a_name_that_it_computes(module: str) -> None:
    dynamic = {"import_module", "exec_module", "spec_from_file_location", "run_path", "run_module"}
    assert dynamic.isdisjoint(node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute))


def test_the_checks_above_find_a_wrong_import_and_a_missing_docstring() -> None:
    assert set(imports_of(ast.parse("def f():\n    from repconv_cli import convert"))) == {"repconv_cli.convert"}
    assert undocumented(ast.parse("def public(): ...\ndef _private(): ...\nclass A:\n    'a'\n    def m(self): ..."))
