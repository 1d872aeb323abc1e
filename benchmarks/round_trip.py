"""The round trip of every timm model that has a converter of its own: writes ``benchmarks/ROUND_TRIP.md``.

    python benchmarks/round_trip.py [--only GLOB] [--out FILE] [--records FOLDER]

For each model: random weights with statistics of real activations, saved alone; ``fuse --arch timm:NAME --target
deploy``; the file loaded strictly into ``timm.utils.reparameterize_model(model)``; outputs compared. The weights are
also fused without the architecture, and the tensors must be the same, bit for bit. With ``--records``, a model that
has a record there is not run again. Needs ``pip install -e '.[benchmarks]'``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.randomise import randomise  # noqa: E402
from repconv_cli import convert  # noqa: E402
from repconv_cli.options import Options  # noqa: E402

CONVERTERS = ("fuse", "reparameterize", "switch_to_deploy")
SMALL = 128
# Enough samples that the statistics of a norm hold for other inputs too: a net is chaotic otherwise.
CALIBRATION_BATCH = 16
# With drawn gammas these deep nets make 0.001 to 0.1 of their range of the last bit, whoever converts them. They keep
# timm's own first weights, whose gammas are drawn as well, but small.
CHAOTIC = {"efficientvit_m5", "levit_128", "levit_conv_128", "mobileone_s4", "repvgg_d2se"}
COLUMNS = (
    "model",
    "family",
    "blocks",
    "verdict (× noise)",
    "strict load",
    "outputs (timm's own)",
    "same alone",
    "graph",
    "seconds",
)


@dataclass(frozen=True)
class Trip:
    """What came of one model.

    ``difference`` is of the outputs, both models in float64, relative to their range; ``own`` the same of timm's own
    conversion, in float32, of the same weights.
    """

    name: str
    family: str = ""
    blocks: int = 0
    verdict: str = ""
    ratio: float = 0.0
    is_loaded: bool = False
    difference: float = 0.0
    own: float = 0.0
    is_same_alone: bool = False
    holds_graph: bool = False
    seconds: float = 0.0
    seconds_alone: float = 0.0
    problem: str = ""

    @property
    def is_right(self) -> bool:
        """Whether all of it held."""
        return (
            self.verdict == "pass"
            and self.is_loaded
            and self.is_same_alone
            and self.difference <= max(1e-5, 4 * self.own)
        )


def main() -> None:
    """Run the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "ROUND_TRIP.md")
    parser.add_argument("--records", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trips: list[Trip] = []
    for name in names(options.only):
        trip = _known(options.records, name) or travel(name)
        trips.append(trip)
        print(row(trip), flush=True)
        if options.records is not None:
            options.records.mkdir(parents=True, exist_ok=True)
            (options.records / f"{name}.json").write_text(json.dumps(asdict(trip)))
        options.out.write_text(table(trips))


def names(pattern: str) -> Iterator[str]:
    """Yield the models that timm can convert, by looking at their modules without making their weights."""
    import timm

    for name in timm.list_models():
        if not fnmatchcase(name, pattern):
            continue
        source = inspect.getsource(sys.modules[timm.model_entrypoint(name).__module__])
        if not any(f"def {method}(" in source for method in CONVERTERS):
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        if any(hasattr(part, method) for part in model.modules() for method in CONVERTERS):
            yield name


def _known(records: Path | None, name: str) -> Trip | None:
    path = None if records is None else records / f"{name}.json"
    return Trip(**json.loads(path.read_text())) if path is not None and path.exists() else None


def travel(name: str) -> Trip:
    """Return what comes of one model; what goes wrong is told, not raised."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _travel(name, Path(folder))
    except Exception as error:  # noqa: BLE001 - one model must not end the run
        return Trip(name, problem=f"{type(error).__name__}: {str(error)[:200]}")


def _travel(name: str, folder: Path) -> Trip:
    import timm
    from safetensors.torch import load_file, save_file
    from timm.utils import reparameterize_model

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    shape = _shape(model)
    with torch.no_grad():
        if name in CHAOTIC:
            _calibrate(model, torch.randn(CALIBRATION_BATCH, *shape))
        else:
            randomise(model, lambda m: m(torch.randn(CALIBRATION_BATCH, *shape)))
    x = torch.randn(2, *shape)
    weights = folder / "weights.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, weights)
    start = time.process_time()
    arch = Options(arch=f"timm:{name}", target="deploy", samples=1, input=(tuple(x.shape),))
    result = convert.fuse(weights, folder / "deploy.safetensors", arch)
    middle = time.process_time()
    alone = convert.fuse(weights, folder / "alone.safetensors", Options())
    end = time.process_time()
    tensors, others = load_file(folder / "deploy.safetensors"), load_file(folder / "alone.safetensors")
    deploy = reparameterize_model(model)
    own = _difference(model, deploy, x)
    deploy.load_state_dict(tensors, strict=True)
    assert result.verification is not None
    return Trip(
        name,
        alone.notes[0].removeprefix("known by its keys: "),
        len(result.blocks),
        result.verification.verdict,
        result.verification.ratio or 0.0,
        True,
        _difference(model, deploy, x),
        own,
        tensors.keys() == others.keys() and all(torch.equal(tensors[key], others[key]) for key in tensors),
        not any("holds no graph" in note for note in result.notes),
        middle - start,
        end - middle,
    )


def _calibrate(model: nn.Module, x: Tensor) -> None:
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    model(x)
    model.eval()


def _shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one sample: small, if the model takes it."""
    default: tuple[int, ...] = model.default_cfg["input_size"]  # type: ignore[index, operator, assignment]
    small = (default[0], SMALL, SMALL)
    try:
        with torch.no_grad():
            model(torch.randn(2, *small))
    except Exception:  # noqa: BLE001 - a model may reject a size in any way
        return default
    return small


def _difference(model: nn.Module, deploy: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected, found = (_first(deepcopy(m).double()(x.double())) for m in (model, deploy))
    return float((found - expected).abs().max() / expected.abs().max())


def _first(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def table(trips: list[Trip]) -> str:
    """Return the trips as a page of markdown."""
    right = sum(trip.is_right for trip in trips)
    head = f"| {' | '.join(COLUMNS)} |"
    return f"""# The round trip of timm's re-parameterizable models

Written by `python benchmarks/round_trip.py`; do not edit. {right} of {len(trips)} models: fused for the deploy class
with the architecture, loaded strictly into `reparameterize_model(model)`, outputs equal, and the same tensors from the
weights alone. "Outputs" is the largest difference relative to the range, both models in float64, so it is the rounding
of the stored float32 tensors; beside it that of timm's own conversion. "graph" tells whether the file can run without
the class. Seconds are processor time.

{head}
|{"---|" * 9}
{chr(10).join(row(trip) for trip in trips)}
"""


def row(trip: Trip) -> str:
    """Return one trip as a row."""
    if trip.problem:
        return f"| {trip.name} | {trip.problem} |" + " |" * 7
    cells = (
        trip.name,
        trip.family,
        trip.blocks,
        f"{trip.verdict} ({trip.ratio:.2g}×)",
        "yes" if trip.is_loaded else "no",
        f"{trip.difference:.1e} ({trip.own:.1e})",
        "yes" if trip.is_same_alone else "NO",
        "yes" if trip.holds_graph else "no",
        f"{trip.seconds:.0f} (alone {trip.seconds_alone:.0f})",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
