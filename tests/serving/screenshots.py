"""Pictures of the web page, taken in Chromium: ``python tests/serving/screenshots.py INDEX --out FOLDER``.

``docs/search.png`` is ``desktop-light.png`` of an index that the demo model made of
``vlm data world --split test --seed 1 --count 24 --twins``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from vlm.cli.index import load
from vlm.retrieval import VideoIndex
from vlm.serving.server import Server, listen
from vlm.serving.settings import ServeSettings
from vlm.serving.state import open_state

DESKTOP, PHONE = (1280, 860), (360, 740)


def until(page: Page, expression: str) -> None:
    """Wait until something is true."""
    for _ in range(2000):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(30)
    raise TimeoutError(expression)


def find(page: Page, text: str) -> None:
    """Search, and wait until every picture that can be seen is there."""
    page.get_by_role("searchbox").fill(text)
    page.get_by_role("searchbox").press("Enter")
    page.wait_for_selector(".card:not(.skeleton), .state:not([hidden])")
    page.wait_for_timeout(300)
    seen = (
        "[...document.querySelectorAll('.shot img')].filter(i => i.getBoundingClientRect().top < innerHeight)"
    )
    until(page, f"{seen}.every(image => image.complete)")
    page.wait_for_timeout(500)


def play(page: Page, text: str) -> None:
    """Open the first hit, and stop within its moment."""
    find(page, text)
    page.locator(".card .open").first.click()
    until(page, "document.querySelector('#video').currentTime > 0")
    page.wait_for_timeout(900)
    page.evaluate("document.querySelector('#video').pause()")
    page.wait_for_timeout(300)


def ask(page: Page, question: str, choices: str) -> None:
    """Ask, and wait for the answer."""
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("searchbox").fill(question)
    page.locator("#choices").fill(choices)
    page.locator("#submit").click()
    page.wait_for_selector(".answer, .state.bad:not([hidden])", timeout=60_000)
    page.wait_for_timeout(900)


def fail(page: Page, text: str) -> None:
    """Search while the server cannot be reached."""
    page.route("**/api/search", lambda route: route.abort())
    find(page, text)


def filter_all(page: Page, text: str) -> None:
    """Filter so that nothing is left."""
    page.get_by_role("button", name="Filters").click()
    page.get_by_label("Name contains").fill("nowhere")
    find(page, text)


def star(page: Page, text: str, end: bool = False) -> None:
    """Star two hits; perhaps go to the end of the page."""
    find(page, text)
    for number in range(2):
        page.locator(".star").nth(number).click()
    until(page, "document.querySelectorAll('.star[aria-pressed=true]').length === 2")
    page.mouse.move(2, 2)
    if end:
        page.locator("#known").scroll_into_view_if_needed()
        page.wait_for_timeout(900)


def hover(page: Page, text: str) -> None:
    """Look into a hit."""
    find(page, text)
    box = page.locator(".card .shot").nth(1).bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 60)
    page.wait_for_timeout(2500)
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 60)
    page.wait_for_timeout(400)


def main() -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("index", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--text", default="a red digit moves right")
    parser.add_argument("--question", default="which way does the red 3 move")
    parser.add_argument("--choices", default="left\nright\nup\ndown")
    arguments = parser.parse_args()
    text = arguments.text
    shots: dict[str, tuple[tuple[int, int], str, Callable[[Page], Any]]] = {
        "home-light": (DESKTOP, "light", lambda page: None),
        "home-phone": (PHONE, "dark", lambda page: None),
        "desktop-light": (DESKTOP, "light", lambda page: find(page, text)),
        "desktop-dark": (DESKTOP, "dark", lambda page: find(page, text)),
        "phone-light": (PHONE, "light", lambda page: find(page, text)),
        "hover": (DESKTOP, "light", lambda page: hover(page, text)),
        "player-light": (DESKTOP, "light", lambda page: play(page, text)),
        "player-dark": (DESKTOP, "dark", lambda page: play(page, text)),
        "player-phone": (PHONE, "light", lambda page: play(page, text)),
        "ask": (DESKTOP, "light", lambda page: ask(page, arguments.question, arguments.choices)),
        "ask-phone": (PHONE, "dark", lambda page: ask(page, arguments.question, arguments.choices)),
        "filters-empty": (DESKTOP, "light", lambda page: filter_all(page, text)),
        "filters-phone": (PHONE, "light", lambda page: filter_all(page, text)),
        "stars-light": (DESKTOP, "light", lambda page: star(page, text)),
        "stars-dark": (DESKTOP, "dark", lambda page: star(page, text + " fast", True)),
        "stars-phone": (PHONE, "light", lambda page: star(page, text + " slowly")),
        "stars-phone-end": (PHONE, "dark", lambda page: star(page, text + " up", True)),
        "error": (DESKTOP, "dark", lambda page: fail(page, text)),
        "ingest": (DESKTOP, "light", lambda page: page.locator("#open-ingest").click()),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    index = VideoIndex.open(arguments.index)
    model, source = load(index.manifest.model.source)
    with tempfile.TemporaryDirectory() as cache:
        folders = {"holidays": Path(cache)}
        # stars are part of the page only where they are wanted, as on the command line
        is_starring = not arguments.only or any(name.startswith("stars") for name in arguments.only)
        settings = ServeSettings(
            port=0,
            cache_folder=Path(cache) / "c",
            ingest_folders=folders,
            queries_file=Path(cache) / "known.csv" if is_starring else None,
        )
        state = open_state(index.folder, model, source, settings)
        ready, addresses = threading.Event(), []
        with listen("127.0.0.1", 0) as listener:
            server = Server(state, listener, lambda address: (addresses.append(address), ready.set()))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            ready.wait(60)
            try:
                take(addresses[0], shots, arguments.out, arguments.only)
            finally:
                server.should_exit = True
                thread.join()
    return 0


def take(address: str, shots: dict[str, Any], out: Path, only: list[str]) -> None:
    """Take each picture in a browser without a past."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        wanted = {name: shot for name, shot in shots.items() if not only or name in only}
        for name, ((width, height), theme, act) in wanted.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector("#stats:not(:empty)")
            act(page)
            page.wait_for_timeout(300)
            page.screenshot(path=out / f"{name}.png")
            context.close()
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
