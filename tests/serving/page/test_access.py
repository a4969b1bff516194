"""The web page for everyone: keyboard, screen readers, both themes, phones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serving.page.driving import SIZES, search, until

AXE = Path(__file__).resolve().parents[2] / "fixtures" / "axe-core" / "axe.min.js"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_serious_stands_in_anyones_way(site, open_page, ids, size, theme) -> None:
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}")
    page = open_page(site.address, size, theme)
    # evaluated by the debugger, so that the page's policy against foreign scripts stays as it is
    page.evaluate(AXE.read_text(encoding="utf-8"))

    def serious() -> list[tuple[str, str]]:
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            (v["id"], v["nodes"][0]["html"][:150]) for v in found if v["impact"] in ("serious", "critical")
        ]

    def no_overflow() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert serious() == [] and no_overflow()
    search(page, "a red thing that the model does not know at all zebra")
    page.get_by_role("button", name="Filters").click()
    until(page, "[...document.querySelectorAll('.shot img')].every(image => image.complete)")
    assert serious() == [] and no_overflow()
    page.locator(f".card[data-video='{ids['old']}'] .open").click()
    until(page, "document.querySelector('#video').currentTime > 0")
    assert serious() == [] and no_overflow()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert serious() == [] and no_overflow()


def test_the_theme_button_overrides_the_system(site, open_page) -> None:
    page = open_page(site.address, theme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.locator("#theme").click()
    assert page.evaluate(colour) != dark
    page.reload()
    page.wait_for_selector("#stats:has-text('videos')")
    assert page.evaluate(colour) != dark
    page.locator("#theme").click()
    assert page.evaluate(colour) == dark


def test_everything_can_be_reached_by_keyboard(site, open_page) -> None:
    page = open_page(site.address)
    search(page, "red")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        where = (
            "(e => [e.id || e.className, e.closest('.card')?.dataset.video ?? ''])(document.activeElement)"
        )
        reached.add(tuple(page.evaluate(where)))
        is_seen = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert page.evaluate(f"{is_seen} || document.activeElement.matches('#text, body')"), reached
    places = {place for place, _ in reached}
    assert {"text", "pick", "submit", "toggle-filters", "theme", "mode-ask"} <= places
    assert sum(place == "open" for place, _ in reached) == 6
    assert sum(place == "tool round like" for place, _ in reached) == 6
    names = [button.inner_text() for button in page.get_by_role("button", name=re.compile("^Play")).all()]
    assert len(names) == 6


def test_the_slash_key_goes_to_the_search_box(site, open_page) -> None:
    page = open_page(site.address)
    page.locator("#theme").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
