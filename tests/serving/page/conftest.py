"""The web page, opened in a real browser that notes what goes wrong."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager

import pytest

from tests.serving.page.driving import SIZES, until


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser extra is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        )
        yield running
        running.close()


@pytest.fixture
def contexts():
    """What is open in the browser."""
    return []


@pytest.fixture
def serving_pages(serving, contexts):
    """`serving`, whose pages are closed before the server is: what they still ask for is no failure."""

    @contextmanager
    def run(*arguments, **settings):
        with serving(*arguments, **settings) as site:
            yield site
            while contexts:
                contexts.pop().close()

    return run


@pytest.fixture
def open_page(browser, contexts):
    """Open the page; at the end, nothing may have been asked of another server, and no script have failed."""
    problems = []

    def open_at(address: str, size: str = "desktop", theme: str = "light", allowed: str = "^$"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def note(message) -> None:
            if message.type == "error" and not re.search(allowed, message.text):
                problems.append(message.text)

        page.on("console", note)
        page.on(
            "request",
            lambda r: None if r.url.startswith((address, "blob:", "data:")) else problems.append(r.url),
        )
        page.goto(address)
        until(page, "document.querySelector('#stats').textContent || document.querySelector('dialog[open]')")
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert problems == []
