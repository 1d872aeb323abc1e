"""Random damage to every sample: refused, or read as if whole, or fused and verified. ``benchmarks/mutations.py``
does a thousand of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.damaged import Victim, judge_damaged, victims
from tests.hostile.mutations import mutated

SEEDS = range(12)
NAMES = (
    "repvgg_digits.pt", "repvgg_digits.pt2", "repvgg_digits_float16.pt", "repvgg_plain_digits.pt",
    "repvgg_plain_digits_state.pt", "mobileone_digits_state.pt", "grouped_digits.pt", "grouped_digits.pt2",
    "repvgg_plain_digits.safetensors", "repvgg_plain_digits_legacy.pth", "grouped_digits_legacy.pth",
    "grouped_digits_fused.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    return {victim.name: victim for victim in victims(tmp_path_factory.mktemp("whole"))}


def test_every_sample_is_damaged(whole: dict[str, Victim]) -> None:
    assert sorted(whole) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_sample_is_refused_or_right(name: str, whole: dict[str, Victim], tmp_path: Path) -> None:
    fates = set()
    for seed in SEEDS:
        kind, content = mutated(name, whole[name].content, seed)
        found = judge_damaged(whole[name], content, tmp_path)
        assert found.wrong == [], f"seed {seed} ({kind}): {found.output[-1000:]}"
        fates.add(found.code)
    assert 2 in fates, "no damage was found"


def test_the_same_seed_gives_the_same_damage_and_another_seed_another(whole: dict[str, Victim]) -> None:
    content = whole["grouped_digits.pt"].content
    damaged = [mutated("grouped_digits.pt", content, seed)[1] for seed in (0, 0, 1)]
    assert damaged[0] == damaged[1] != damaged[2]
    assert content not in damaged


def test_damage_that_nothing_finds_is_told(whole: dict[str, Victim], tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The judge is judged: a reader that gives other tensors than the file's must not pass."""
    import torch

    from repconv_cli.checkpoint import read
    from tests.hostile import damaged

    victim = whole["grouped_digits.pt"]
    path = tmp_path / victim.name
    path.write_bytes(victim.content)
    wrong = read(path)
    assert wrong.module is not None
    with torch.no_grad():
        next(wrong.module.parameters()).view(-1)[0] += 1e-3
    monkeypatch.setattr(damaged, "read", lambda _: wrong)
    assert judge_damaged(victim, victim.content + b" ", tmp_path).wrong == ["other tensors than in the whole file"]
