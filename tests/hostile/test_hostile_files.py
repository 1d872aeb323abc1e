"""Every hostile or damaged file: refused in one clean line, or fused and right; nothing in it is ever run."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from repconv_cli.convert import load
from tests.cli.runs import run
from tests.hostile import (
    archive_cases,
    code_cases,
    content_cases,
    greedy_cases,
    program_cases,
    safetensors_cases,
    shared_cases,
)
from tests.hostile.case import MARKER, Case, make_net
from tests.hostile.judge import judge, options_for
from tests.hostile.payloads import by_opcode, by_protocol, extension_registered

CASES = (
    *code_cases.CASES,
    *greedy_cases.CASES,
    *shared_cases.CASES,
    *archive_cases.CASES,
    *safetensors_cases.CASES,
    *program_cases.CASES,
    *content_cases.CASES,
)


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import and compile what the first run needs, so that no file is charged for it."""
    folder = tmp_path_factory.mktemp("warm")
    torch.save(make_net(), folder / "net.pt")
    assert run("fuse", folder / "net.pt", folder / "net.safetensors").exit_code == 0


def test_there_are_enough_cases_and_no_two_share_a_name() -> None:
    assert len(CASES) >= 200
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_file_is_refused_in_one_line_or_fused_right(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out" / "model.safetensors"
    folder.mkdir()
    out.parent.mkdir()
    # A payload that knows no path makes its marker in the working folder.
    monkeypatch.chdir(folder)
    case.write(folder / "file.pt")
    found = judge(folder / "file.pt", out, *options_for(case, folder))
    assert found.wrong == [], found.output[-2000:]
    if case.reason is None:
        assert found.code == 0, found.output[-2000:]
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            assert torch.allclose(load(out)(x), make_net()(x), atol=1e-5)
    elif case.reason or found.code:
        assert found.is_refused, found.output[-2000:]
        assert re.search(case.reason, found.message), found.message


@pytest.mark.parametrize("opcode", by_opcode(Path()))
def test_each_payload_runs_in_an_ordinary_unpickler(opcode: str, tmp_path: Path) -> None:
    with extension_registered():
        try:
            pickle.loads(by_opcode(tmp_path / MARKER)[opcode])
        except (TypeError, ValueError) as error:
            raise AssertionError("the payload is broken, so its refusal proves nothing") from error
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("protocol", range(6))
def test_each_protocol_runs_in_an_ordinary_unpickler(protocol: int, tmp_path: Path) -> None:
    pickle.loads(by_protocol(tmp_path / MARKER, protocol))
    assert (tmp_path / MARKER).exists()
