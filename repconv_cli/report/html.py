"""A result as one HTML file that loads nothing: every text from a file is escaped, and no script but ours can run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from repconv_cli import __version__
from repconv_cli.report.page_data import data_of
from repconv_cli.report.page_facts import page_facts
from repconv_cli.report.words import plain
from repconv_cli.results import Result

_ASSETS = Path(__file__).with_name("assets")
_SCRIPTS = ("layout.js", "model.js", "pane.js", "block.js", "main.js")


def html_page(result: Result, options: tuple[str, ...] = ()) -> str:
    """Return ``result`` as a page; ``options`` are those that the next command needs too."""
    style = _asset("page.css")
    script = '"use strict";\n' + "\n".join(map(_asset, _SCRIPTS))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(_ASSETS), trim_blocks=True
    )
    environment.filters |= {"breakable": _breakable, "plain": plain}
    return environment.get_template("page.html.j2").render(
        page=page_facts(result, options, __version__),
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(_inert_json(data_of(result))),
    )


def _breakable(name: str) -> Markup:
    """Return a name, escaped, that a narrow column may break after a dot or an underscore, and nowhere else."""
    pieces = re.split(r"(?<=[._/])", name)
    return Markup("<wbr>").join(pieces)


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which the page's policy lets this text, and no other, run."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inert_json(value: object) -> str:
    """Return JSON in which no character can end a script element or start a tag."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
