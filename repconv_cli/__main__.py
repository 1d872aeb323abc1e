"""``python -m repconv_cli``."""

from repconv_cli.cli.start import run

run()
