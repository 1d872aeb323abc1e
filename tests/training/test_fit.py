"""The training loop: it repeats bit for bit, it learns, and R-Drop does what it is for."""

import io

import pytest
import torch
from torch import nn

from repconv_cli.errors import InputError
from repconv_cli.training import RepConv, fit, mean_symmetric_kl

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(70, 1, 4, 4, generator=GENERATOR)
LABELS = (IMAGES[:, 0, :2].sum(dim=(1, 2)) > IMAGES[:, 0, 2:].sum(dim=(1, 2))).long()


def trained(alpha=1.0, epochs=2, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(RepConv(1, 4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 2))
    return model, fit(model, IMAGES, LABELS, alpha=alpha, epochs=epochs, batch_size=16, seed=seed)


def file_bytes(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_the_same_call_gives_the_same_bytes_whatever_was_drawn_before():
    first, history = trained()
    torch.rand(17)
    second, again = trained()
    assert history == again
    assert file_bytes(first) == file_bytes(second)


def test_another_seed_gives_other_weights():
    assert file_bytes(trained(seed=0)[0]) != file_bytes(trained(seed=1)[0])


def test_an_incomplete_batch_is_left_out_and_every_other_counts():
    """70 examples in batches of 16 are 4 steps an epoch."""
    model, history = trained(epochs=3)
    assert len(history) == 3
    assert {int(value) for key, value in model.state_dict().items() if key.endswith("tracked")} == {12}


def test_it_learns_and_rdrop_brings_the_passes_together():
    plain, history = trained(alpha=0.0, epochs=15)
    rdrop, _ = trained(alpha=5.0, epochs=15)
    assert history[-1] < history[0] / 2
    for model in (plain, rdrop):
        assert (model.eval()(IMAGES).argmax(dim=1) == LABELS).float().mean() > 0.9
    assert mean_symmetric_kl(rdrop, IMAGES) < 0.7 * mean_symmetric_kl(plain, IMAGES)


@pytest.mark.parametrize(("images", "labels"), [(70, 69), (15, 15)])
def test_too_few_examples_or_labels_are_refused(images, labels):
    with pytest.raises(InputError, match=f"{images} images and {labels} labels; needed: as many of each, and at least"):
        fit(nn.Flatten(), IMAGES[:images], LABELS[:labels], alpha=1.0, epochs=1, batch_size=16)
