"""The table is what the documentation says, and every family is told from every other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from repconv_cli.checkpoint.families.recognise import family_of
from repconv_cli.checkpoint.families.table import FAMILIES
from tests.families.reference import CASES, Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-family.md"


def test_every_family_is_in_the_documentation_with_its_eps_and_the_other_way_round() -> None:
    rows = re.findall(r"^\| ([^|`]+) \| `.*\| ([0-9.e-]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(family.name, f"{family.eps:g}") for family in FAMILIES]


@pytest.mark.parametrize("case", CASES, ids=[case.family for case in CASES])
def test_a_family_is_known_in_both_forms(case: Case) -> None:
    found = family_of(case.training().state_dict())
    assert found is not None
    assert found.name == case.family
    assert family_of(case.deploy().state_dict()) is not None


def test_networks_of_no_family_are_known_as_none() -> None:
    import timm
    import torch
    import torchvision

    with torch.device("meta"):
        others = [timm.create_model(n) for n in ("resnet18", "regnety_002", "mobilenetv3_small_050", "efficientnet_b0")]
        others += [torchvision.models.get_model(n, weights=None) for n in ("resnet18", "vgg11_bn", "mobilenet_v2")]
    assert [family_of(model.state_dict()) for model in others] == [None] * len(others)
