"""What a refusal needs to go away, in words; nothing where nothing should be done."""

from __future__ import annotations

NOTHING = "nothing to do"
"""How advice begins where all is as it should be."""

# (what the reason says, what would change it): the first that fits.
_ADVICE = (
    ("times the work", f"{NOTHING}: as it is, it is faster"),
    ("nothing would be saved", f"{NOTHING}: as it is, it is faster"),
    ("folding would compute it twice", f"{NOTHING}: as it is, it is faster"),
    ("a biased map before zero padding", "exact if the inner layer has no bias, or pads with it (see docs/algebra.md)"),
    ("padding inside zero padding", "exact if both layers pad alike"),
    ("uncounted", "exact with count_include_pad=True"),
    ("average pool in ceil mode", "exact with ceil_mode=False"),
    ("the batch's own statistics", "save the model in eval mode, with running statistics"),
    ("without running statistics", "train it with track_running_stats=True"),
    ("output sizes", "other sizes may hold: fix them with --input, or pad so that the sizes agree"),
    ("every remainder by the stride", "a fixed input size may hold: export the model with it"),
    ("not checked at other sizes", "a fixed input size may hold: export the model with it"),
    ("the scale depends on the input", f"{NOTHING}: it is computed from each input anew"),
    ("depends on the input", "only a batch norm with running statistics can be folded"),
    ("no convolution to fold into", f"{NOTHING}: an activation or a sum lies between"),
    ("no common linear source", f"{NOTHING}: an activation lies between the branches and their source"),
    ("could not be proven", "please report this model"),
)


def advice_on(reason: str) -> str | None:
    """Return what would change a refusal with this ``reason``, None if nothing is known.

    >>> advice_on("average pool in ceil mode: windows past the border average fewer values")
    'exact with ceil_mode=False'
    """
    return next((advice for found, advice in _ADVICE if found in reason), None)
