"""``python -m repconv_cli``."""

from repconv_cli.cli.main import run

run()
