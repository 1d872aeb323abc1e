from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from repconv_cli.checkpoint import read
from repconv_cli.errors import EXIT_CANNOT_RUN, InputError
from tests.checkpoint.tensor_checks import randomised


@pytest.fixture
def conv_net() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomised(layers).eval()


@pytest.fixture
def refused() -> Callable[..., InputError]:
    """Read a file that must be refused with one clean line, and return the error."""

    def check(path: Path, kind: type[InputError], match: str, **options: object) -> InputError:
        with pytest.raises(kind, match=match) as caught:
            read(path, **options)  # type: ignore[arg-type]
        text = str(caught.value)
        assert caught.value.exit_code == EXIT_CANNOT_RUN
        assert text.isprintable(), "a refusal holds control characters"
        assert len(text) < 2000
        assert not re.search("weights_only|add_safe_globals|safe_globals|unsafe switch", text)
        return caught.value

    return check
