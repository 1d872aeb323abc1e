"""A headless browser, where there is one: the system's, or Playwright's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from repconv_cli.report.html import html_page
from repconv_cli.results import Result

_QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_NAMES = ("chromium", "chromium-browser", "google-chrome")


def _without(reason: str) -> NoReturn:
    """Skip what needs a browser; fail where the run must not do without."""
    if os.environ.get("REPCONV_NEEDS_BROWSER"):
        pytest.fail(f"the browser tests cannot run: {reason}")
    pytest.skip(f"no browser tests: {reason}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser; the test is skipped, and says so, where there is none."""
    try:
        from playwright import sync_api as api
    except ImportError:
        _without("Playwright is not installed")
    found = os.environ.get("REPCONV_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)
    with api.sync_playwright() as playwright:
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            _without("there is no Chromium (apt-get install chromium)")
        chromium = playwright.chromium.launch(executable_path=path, args=list(_QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a result's page; that nothing went wrong in it is checked when the test ends."""
    contexts, errors, requests = [], [], []

    def show(result: Result, **how: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(html_page(result), encoding="utf-8")
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield show
    for context in contexts:
        context.close()
    assert errors == []
    assert {url.partition(":")[0] for url in requests} <= {"file"}
