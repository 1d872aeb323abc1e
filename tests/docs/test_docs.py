"""What the documentation says is true: examples run, commands have the options that they show, links lead somewhere."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.readme import with_results
from repconv_cli.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


def shown_commands() -> list[tuple[str, str]]:
    """Each command line of a shell block: (page, line)."""
    found = []
    for name, path in PAGES.items():
        for block in re.findall(r"^```(?:sh|text)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            lines = [line.removeprefix("$ ").strip() for line in block.splitlines()]
            found += [(name, line) for line in lines if line.startswith("repconv ")]
    return found


@every_page
def test_examples_run_and_give_what_they_show(page: Path) -> None:
    failures, _ = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failures == 0


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_a_command_that_is_shown_can_be_typed(page: str, line: str) -> None:
    words = shlex.split(line.partition(" | ")[0], comments=True)
    assert words[1] in COMMANDS or words[1].startswith("--"), page
    if words[1] in COMMANDS:
        # Raises for an option that is not there, and for a missing or spare argument.
        COMMANDS[words[1]].make_context(words[1], words[2:])


def test_every_option_is_in_the_documentation_and_the_other_way_round() -> None:
    there = {
        option
        for command in COMMANDS.values()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--") and option != "--help"
    }
    table = PAGES["commands.md"].read_text().partition("## Options")[2].partition("## The page")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == there


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_that_can_be_typed(command: str) -> None:
    text = COMMANDS[command].help
    lines = [
        line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip().startswith("repconv ")
    ]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line.partition(" | ")[0])
        assert words[1] == command
        COMMANDS[command].make_context(command, words[2:])


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_has_the_results_that_were_measured() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- results: ") == 1
    assert with_results(text) == text


def test_paths_that_are_named_exist() -> None:
    for page in PAGES.values():
        for path in re.findall(r"`((?:repconv_cli|tests|benchmarks|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_contributing_is_short() -> None:
    assert len(PAGES["CONTRIBUTING.md"].read_text().splitlines()) < 60
