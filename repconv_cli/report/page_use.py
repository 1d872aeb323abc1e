"""What to do with the file that was written, in code to copy; or what to do next where there is none."""

from __future__ import annotations

from pathlib import PurePath

from repconv_cli.report import sentences
from repconv_cli.report.words import command, inputs, plain
from repconv_cli.results import OutputFacts, Result

# A line to copy is not broken.
_WIDE = 100_000

_LOADED = (
    "from repconv_cli import load\n\n"
    "model = load({path!r})  # an nn.Module; no pickle, no source code of the model needed\n"
    "y = model(x)  # x: {x}"
)
_BY_SUFFIX = {
    ".onnx": (
        "import onnxruntime\n\n"
        "session = onnxruntime.InferenceSession({path!r})\n"
        "y = session.run(None, {{session.get_inputs()[0].name: x}})  # x: {x}"
    ),
    ".pt2": (
        "import torch\n\n"
        "model = torch.export.load({path!r}).module()\n"  # The user's own file, and the user's own choice.
        "y = model(x)  # x: {x}"
    ),
}
_DEPLOY = (
    "from safetensors.torch import load_file\n\n"
    "model.load_state_dict(load_file({path!r}))  # model: made by its repository's class, in deploy form"
)


def use_of(result: Result, output: OutputFacts, options: tuple[str, ...]) -> str:
    """Return how ``output`` is loaded and run, and how it is judged again."""
    path = plain(output.path)
    told = _DEPLOY if result.source.kind == "weights alone" else _BY_SUFFIX.get(PurePath(path).suffix, _LOADED)
    verify = command(["repconv", "verify", result.source.name, output.path, *options], _WIDE)
    return f"{told.format(path=path, x=inputs(result.input))}\n\n# in a shell, to judge the file again:\n{verify}"


def next_step(result: Result, options: tuple[str, ...], *, is_done: bool) -> str:
    """Return the next command, where no file was written."""
    name = result.source.name
    if is_done:
        return "Nothing to do."
    if sentences.is_unknown(result):
        return command(["repconv", "inspect", name, "--arch", "file.py:callable"], _WIDE)
    return command(["repconv", "fuse", name, sentences.name_for_output(result), *options], _WIDE)
