"""The training side: the multi-branch block that the tool fuses, and the loss its samples are trained with."""

from repconv_cli.training.dropout import ScaledDropout
from repconv_cli.training.fit import fit
from repconv_cli.training.rdrop import (
    RDropLoss,
    dropout_active,
    mean_symmetric_kl,
    rdrop_loss,
    symmetric_kl,
    two_passes,
)
from repconv_cli.training.repconv import RepConv

__all__ = [
    "RDropLoss",
    "RepConv",
    "ScaledDropout",
    "dropout_active",
    "fit",
    "mean_symmetric_kl",
    "rdrop_loss",
    "symmetric_kl",
    "two_passes",
]
