"""Stars on the page: pressed by mouse or keyboard, there after a reload, only where they mean something."""

from __future__ import annotations

import pytest

from tests.serving.page.driving import SIZES, cards, search, until
from tests.serving.page.test_access import AXE
from vlm.retrieval.quality.known_items import read_known_items


@pytest.fixture
def starring(index, serving_pages, tmp_path):
    with serving_pages(index, tmp_path / "cache", queries_file=tmp_path / "known.csv") as site:
        yield site


def test_a_star_is_a_row_until_it_is_pressed_again(starring, open_page, ids, tmp_path) -> None:
    page = open_page(starring.address)
    search(page, "a red thing")
    star = page.locator(f".card[data-video='{ids['blue']}'] .star")
    assert "No known queries yet" in page.locator("#known").inner_text()
    assert star.get_attribute("aria-pressed") == "false" and "blue.mp4" in star.get_attribute("aria-label")
    star.focus()
    page.keyboard.press("Space")
    until(page, "document.querySelector('#known').innerText.startsWith('1 known query.')")
    assert star.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.activeElement.classList.contains('star')")
    hits = starring.post("/api/search", {"text": "a red thing", "top_k": 24}).json["hits"]
    hit = next(hit for hit in hits if hit["video_id"] == ids["blue"])
    (item,) = read_known_items(tmp_path / "known.csv")
    assert (item.query, item.video, item.start_s, item.end_s) == (
        "a red thing", hit["path"], hit["start_s"], hit["end_s"],
    )  # fmt: skip
    command = page.locator("#known-command").inner_text()
    assert command == starring.get("/api/queries").json["command"]
    page.reload()
    page.wait_for_selector(".card:not(.skeleton)")
    assert page.locator(".star[aria-pressed='true']").count() == 1
    search(page, "another text")
    assert page.locator(".star[aria-pressed='true']").count() == 0
    search(page, "a red thing")
    star.click()
    until(page, "document.querySelector('#known').innerText.startsWith('No known queries')")
    assert star.get_attribute("aria-pressed") == "false"


def test_only_texts_have_stars(starring, site, open_page, ids) -> None:
    page = open_page(starring.address)
    search(page, "red")
    assert page.locator(".star").count() == cards(page).count() == 6
    page.locator(f".card[data-video='{ids['red']}'] .like").click()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 5")
    assert page.locator(".star").count() == 0 and not page.locator("#known").is_visible()
    page = open_page(site.address)
    search(page, "red")
    assert page.locator(".star").count() == 0
    assert "vlm serve INDEX --queries FILE.csv" in page.locator("#known").inner_text()


def test_a_file_that_broke_is_told_of(starring, open_page, tmp_path) -> None:
    page = open_page(starring.address, allowed="409")
    search(page, "red")
    (tmp_path / "known.csv").write_text("my notes\n")
    page.locator(".star").first.click()
    page.wait_for_selector("#note:has-text('known.csv: expected the columns')")
    assert page.locator(".star").first.get_attribute("aria-pressed") == "false"
    assert (tmp_path / "known.csv").read_text() == "my notes\n"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_stars_stand_in_nobodys_way(starring, open_page, size, theme) -> None:
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}")
    page = open_page(starring.address, size, theme)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    search(page, "a red thing")
    page.locator(".star").first.click()
    until(page, "document.querySelector('.star[aria-pressed=true]')")
    until(page, "[...document.querySelectorAll('.shot img')].every(image => image.complete)")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
