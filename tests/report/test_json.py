"""The JSON document against its schema, and the schema against the classes that it is made from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from torch import nn

from repconv_cli.errors import InputError
from repconv_cli.report.as_json import error_json, result_json
from repconv_cli.report.schema import PATH, schema
from repconv_cli.results import RESULT_VERSION, Result
from tests.cli.conftest import saved
from tests.cli.runs import INPUT, run
from tests.report.made import BENCHED, DIFFERENT, FUSED, INSPECTED, LISTED, PASSED, VERIFIED, drawn

CHECKER = jsonschema.Draft202012Validator(schema())
ALL = {
    "inspect": INSPECTED,
    "fuse": FUSED,
    "verify": VERIFIED,
    "verify, fail": DIFFERENT,
    "bench": BENCHED,
    "weights": LISTED,
}


def test_the_copy_in_the_repository_is_the_schema_of_this_version() -> None:
    assert json.loads(PATH.read_text()) == schema(), "run python -m repconv_cli.report.schema"
    assert PATH.name == f"result-{RESULT_VERSION}.json"
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("result", ALL.values(), ids=ALL)
def test_every_result_fits(result: Result) -> None:
    CHECKER.validate(json.loads(result_json(result)))


def test_what_a_command_prints_fits(tmp_path: Path) -> None:
    small = saved(tmp_path / "small.pt", nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    out = tmp_path / "out.safetensors"
    for arguments in (("inspect", small), ("fuse", small, out), ("verify", small, out), ("inspect", tmp_path / "none")):
        CHECKER.validate(json.loads(run(*arguments, *INPUT, "--json").stdout))


def test_an_error_fits() -> None:
    CHECKER.validate(json.loads(error_json(InputError("12 bytes", needed="64").at("model.pt"))))


@pytest.mark.parametrize("missing", ["blocks", "totals", "verification", "version", "source"])
def test_a_document_without_a_field_does_not_fit(missing: str) -> None:
    document = json.loads(result_json(FUSED))
    del document[missing]
    assert not CHECKER.is_valid(document)


def test_a_figure_in_words_does_not_fit() -> None:
    document = json.loads(result_json(FUSED))
    document["totals"]["convs"]["before"] = "44"
    assert not CHECKER.is_valid(document)


def test_a_figure_that_is_not_finite_is_null() -> None:
    document = json.loads(result_json(replace(VERIFIED, verification=replace(PASSED, max_abs=math.inf))))
    assert document["verification"]["max_abs"] is None
    CHECKER.validate(document)


def test_the_drawing_is_no_part_of_the_document() -> None:
    assert json.loads(result_json(drawn(INSPECTED))).keys() == json.loads(result_json(INSPECTED)).keys()
    assert "drawing" not in json.loads(result_json(drawn(FUSED)))
