"""What a trace keeps, what it leaves out, and what it refuses, in one line."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repconv_cli.errors import TraceError
from repconv_cli.graph import export as export_room
from repconv_cli.graph.program import ProgramModule
from repconv_cli.graph.trace import trace
from tests.graph.models import Formula, conv, randomised
from tests.graph.proof import noise

SHAPE = (2, 4, 9, 9)


def checked_values(part: Any, x: Tensor) -> Tensor:
    """As transformers' attention does: an assertion on values, which nothing else reads."""
    y: Tensor = part.conv(x)
    torch._check_tensor_all((y == y).flatten(), lambda: "not a number")  # type: ignore[attr-defined]
    return y


def test_an_assertion_on_values_is_left_out() -> None:
    program = trace(randomised(Formula(checked_values, conv=conv(4, 4))), noise(SHAPE))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.conv2d.default"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda part, x: part.conv(x)[x > 0].sum(), r"depends on the values of the input"),
        (lambda part, x: part.conv(x) if bool(x.sum() > 0) else x, r"torch\.export cannot trace this model"),
    ],
    ids=["a size that depends on values", "a branch that depends on values"],
)
def test_what_depends_on_values_is_refused_in_one_line(function: Any, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as caught:
        trace(randomised(Formula(function, conv=conv(4, 4))), noise(SHAPE))
    assert "\n" not in caught.value.found
    assert caught.value.hint


def test_views_are_reshapes_which_take_any_memory_layout() -> None:
    module = randomised(nn.Sequential(conv(4, 4), nn.Flatten(1)))
    program = trace(module, noise(SHAPE))
    assert not any("view" in str(node.target) for node in program.graph.nodes)


def test_inputs_of_one_batch_size_keep_it_free() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            joined: Tensor = self.conv(torch.cat([x, y], 1))
            return joined

    module = randomised(Joined())
    program = trace(module, noise(SHAPE, SHAPE))
    assert [info.shape[0] for info in program.inputs] == [None, None]
    x, y = noise((5, *SHAPE[1:]), (5, *SHAPE[1:]), seed=1)
    with torch.no_grad():
        assert torch.equal(ProgramModule(program)(x, y), module(x, y))


def test_a_batch_that_the_model_fixes_is_fixed() -> None:
    def forward(part: Any, x: Tensor) -> Tensor:
        return part.conv(x) * torch.arange(1.0, 3.0).reshape(2, 1, 1, 1)  # type: ignore[no-any-return]

    program = trace(randomised(Formula(forward, conv=conv(4, 4))), noise(SHAPE))
    assert program.inputs[0].shape == SHAPE
    assert program.notes


def test_an_export_that_does_not_end_with_free_sizes_is_made_with_fixed_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_room, "_MOST_SECONDS", 1)
    torch_export, ended = torch.export.export, []

    def endless_if_free(*args: Any, dynamic_shapes: dict[str, Any], **kwargs: Any) -> Any:
        if any(dynamic_shapes.values()):
            try:
                time.sleep(30)
                ended.append(True)
            except Exception:  # noqa: BLE001 - as torch does around its guesses
                raise AssertionError("the end of the time looked like an error") from None
        return torch_export(*args, dynamic_shapes=dynamic_shapes, **kwargs)

    monkeypatch.setattr(torch.export, "export", endless_if_free)
    program = trace(nn.Conv2d(3, 4, 3), (torch.randn(2, 3, 8, 8),))
    assert not ended
    assert program.notes == (
        "batch and spatial sizes are fixed to the example's: torch.export did not end within 1 s while they were free",
    )
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda part, y: y + torch.randn(9), r"^\w+ in 1 draws random numbers in eval mode"),
        (lambda part, y: nn.functional.dropout(y, 0.5, training=True), r"^\w+ in 1 draws random numbers in eval mode"),
        (lambda part, y: torch.bernoulli(y.sigmoid()), r"^\w+ in 1 draws random numbers in eval mode"),
        (
            lambda part, y: nn.functional.batch_norm(y, part.norm.running_mean, part.norm.running_var, training=True),
            r"^the model writes to 1\.norm\.running_mean while it runs",
        ),
    ],
    ids=["noise", "dropout that ignores eval mode", "bernoulli", "norm that ignores eval mode"],
)
def test_what_the_inputs_alone_do_not_decide_is_refused(draw: Any, reason: str) -> None:
    model = nn.Sequential(conv(4, 4), Formula(draw, norm=nn.BatchNorm2d(4)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TraceError, match=reason):
        trace(model, noise(SHAPE))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_could_draw_and_does_not_is_taken():
    def calm(part: Any, x: Tensor) -> Tensor:
        return nn.functional.rrelu(nn.functional.scaled_dot_product_attention(x, x, x))

    assert trace(Formula(calm), noise(SHAPE))


def test_an_operator_with_several_names_has_one():
    def joined(part: Any, x: Tensor) -> Tensor:
        mask = (x > 0) & (x < 1)
        return torch.concat([x * mask, torch.concatenate([x, x], 1)], 1)

    names = {str(node.target) for node in trace(Formula(joined), noise(SHAPE)).graph.nodes}
    assert {"aten.cat.default", "aten.bitwise_and.Tensor"} <= names
    assert not {name for name in names if "concat" in name or "__and__" in name}
