"""TorchScript archives: the tensors that torch itself finds, by its names, and nothing of the code."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import repconv_cli
from repconv_cli.checkpoint import FileFormat, read
from repconv_cli.errors import DamagedFileError, InputError, UnsafeFileError
from tests.checkpoint.hostile_files import Calls, zip_file
from tests.checkpoint.tensor_checks import randomised, same_tensors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Everything(nn.Module):
    """Parameters, buffers, attributes that are neither, lists, a shared weight, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = torch.ones(3)
        self.names = ["a", "b"]
        self.sizes = [1, 2]
        self.table = {"a": torch.ones(2)}
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.scale = nn.Parameter(torch.ones(2))
        self.again = self.body
        self.tied = nn.Conv2d(3, 4, 3)
        self.tied.weight = self.conv.weight
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.body(self.norm(self.conv(x)))) + self.tied(x)
        return y * self.scale[0] + len(self.names) + self.sizes[0] + self.grid[0] + self.offset + self.table["a"][0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomised(Everything()).eval()


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.script(model)


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    return torch.jit.trace(model, torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("make", [scripted, traced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_tensors_are_those_of_torchs_own_state_dict(
    tmp_path: Path, model: nn.Module, make: Callable[..., torch.jit.ScriptModule], dtype: torch.dtype
) -> None:
    module = make(model) if dtype is torch.float32 else torch.jit.script(randomised(Everything()).to(dtype))
    torch.jit.save(module, str(tmp_path / "m.pt"))
    source = read(tmp_path / "m.pt")
    assert (source.kind, source.format) == ("weights", FileFormat.TORCHSCRIPT)
    same_tensors(source, torch.jit.load(str(tmp_path / "m.pt")).state_dict())
    assert source.tensors is not None
    assert "grid" not in source.tensors


ARCH = "from torch import nn\ndef make(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"


def test_it_fuses_with_an_architecture_and_asks_for_one(tmp_path: Path) -> None:
    net = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    traced(net).save(str(tmp_path / "m.pt"))
    (tmp_path / "arch.py").write_text(ARCH)
    with pytest.raises(InputError, match=r"TorchScript archive: its graph is code and is never run.*--arch file\.py"):
        repconv_cli.fuse(tmp_path / "m.pt", tmp_path / "out.safetensors")
    arch = f"{tmp_path / 'arch.py'}:make"
    assert repconv_cli.fuse(tmp_path / "m.pt", tmp_path / "out.safetensors", arch=arch).verification
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(repconv_cli.load(tmp_path / "out.safetensors")(x), net(x))


def test_a_frozen_module_has_no_parameters_left(tmp_path: Path, model: nn.Module, refused) -> None:  # type: ignore[no-untyped-def]
    torch.jit.save(torch.jit.freeze(scripted(model)), str(tmp_path / "m.pt"))
    refused(tmp_path / "m.pt", InputError, "holds no parameters: a frozen module has them in its code")


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, bytes]:
    torch.jit.save(scripted(randomised(nn.Sequential(nn.Conv2d(1, 2, 3)))), str(tmp_path / "m.pt"))
    return members(tmp_path / "m.pt")


def test_code_that_would_run_when_torch_loads_it_is_left_alone(tmp_path: Path, parts: dict[str, bytes]) -> None:
    wanted = read(zip_file(tmp_path / "plain.pt", parts)).tensors
    hostile = "\n  def __setstate__(self, state: int) -> None:\n    torch.save(state, 'marker')\n"
    changed = {name: part + (hostile.encode() if name.endswith(".py") else b"") for name, part in parts.items()}
    changed["m/constants.pkl"] = b"cposix\nmkdir\n(S'marker'\ntR."
    assert wanted is not None
    same_tensors(read(zip_file(tmp_path / "hostile.pt", changed)), wanted)
    assert not Path("marker").exists()


CONTAINER = "class Sequential(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
LEVEL = b"c__torch__.torch.nn.modules.container\nSequential\n)\x81"
DATA = [
    ("itself", LEVEL + b"q\x00}U\x01ah\x00sb.", DamagedFileError, "contain themselves"),
    ("no class", b"c__torch__.x\nY\n)\x81}b.", DamagedFileError, r"does not say what a __torch__\.x\.Y is"),
    ("odd state", b"c__torch__.x\nY\n)\x81Nb.", InputError, "a way of its own"),
    ("a call", pickle.dumps(Calls(print, "x"), 2), UnsafeFileError, "builtins.print"),
    ("an act", b"cposix\nmkdir\n(S'marker'\ntR.", UnsafeFileError, "posix.mkdir"),
    ("cut", b"c__torch__.x\n", DamagedFileError, "not well-formed"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "kind", "reason"), [d[1:] for d in DATA], ids=[d[0] for d in DATA])
def test_a_false_archive_is_refused(tmp_path: Path, parts, refused, data: bytes, kind, reason: str) -> None:  # type: ignore[no-untyped-def]
    code = {"m/code/__torch__/torch/nn/modules/container.py": CONTAINER.encode()}
    path = zip_file(tmp_path / "w.pt", {**parts, **code, "m/data.pkl": data})
    refused(path, kind, reason)


def test_a_module_that_holds_another_in_many_places_takes_no_time(tmp_path: Path, parts, refused) -> None:  # type: ignore[no-untyped-def]
    code = {"m/code/__torch__/torch/nn/modules/container.py": CONTAINER.encode()}
    data = b"\x80\x02" + LEVEL + b"}bq\x000"
    for n in range(1, 60):
        data += LEVEL + b"}(U\x01ah%cU\x01bh%cubq%c0" % (n - 1, n - 1, n)
    path = zip_file(tmp_path / "w.pt", {**parts, **code, "m/data.pkl": data + b"h\x3b."})
    refused(path, InputError, "uses its modules in more than 100000 places")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_cut_archive_is_refused(tmp_path: Path, model: nn.Module, refused, share: float) -> None:  # type: ignore[no-untyped-def]
    torch.jit.save(scripted(model), str(tmp_path / "m.pt"))
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "m.pt", DamagedFileError, "cut short or damaged")


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path, model: nn.Module, refused) -> None:  # type: ignore[no-untyped-def]
    torch.jit.save(scripted(model), str(tmp_path / "m.pt"))
    content = bytearray((tmp_path / "m.pt").read_bytes())
    content[content.index(model.conv.weight.detach().numpy().tobytes()) + 7] ^= 1  # type: ignore[operator, union-attr]
    (tmp_path / "m.pt").write_bytes(content)
    refused(tmp_path / "m.pt", DamagedFileError, "fails its checksum")
