"""One thread for every test; each sample traced once and fused once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from repconv_cli import convert
from repconv_cli.opening import Opened
from repconv_cli.options import Options
from tests.cli.runs import FusedSample, Sample, fuse_sample


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_all():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def trace_once() -> Callable[[Opened, Options], Any]:
    """``convert.trace_source`` that remembers files: tracing takes most of the time, and gives data none changes."""
    traced: dict[object, Any] = {}
    trace_source = convert.trace_source

    def remembered(opened: Opened, options: Options) -> Any:
        key = (opened.facts.sha256, options.arch, options.input)
        if key not in traced:
            traced[key] = trace_source(opened, options)
        return traced[key]

    return remembered


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory, trace_once: Callable[..., Any]) -> Callable[[Sample], FusedSample]:
    """Give a sample's fused file, made by ``repconv fuse --json`` when it is first asked for."""
    made: dict[str, FusedSample] = {}

    def get(sample: Sample) -> FusedSample:
        if sample.file not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(convert, "trace_source", trace_once)
                made[sample.file] = fuse_sample(sample, tmp_path_factory.mktemp("fused"))
        return made[sample.file]

    return get
