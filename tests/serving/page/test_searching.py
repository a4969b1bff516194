"""The web page in a real browser: search, play at the moment, filter, upload, ask, errors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.serving.page.driving import cards, search, until
from vlm import Client


def test_a_search_shows_moments_and_says_so(site, open_page) -> None:
    page = open_page(site.address)
    assert "6 videos" in page.locator("#stats").inner_text()
    search(page, "a red thing")
    assert cards(page).count() == 6
    expected = site.post("/api/search", {"text": "a red thing", "top_k": 24}).json["hits"]
    shown = page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.video)")
    assert shown == [hit["video_id"] for hit in expected]
    until(page, "document.querySelector('#live').textContent === '6 moments found'")
    until(page, "[...document.querySelectorAll('.shot img')].every(image => image.naturalWidth === 320)")
    assert page.url.endswith("?q=a+red+thing")
    assert page.title() == "a red thing – video search"


def test_names_are_text_never_markup(site, open_page) -> None:
    page = open_page(site.address)
    search(page, "<img src=x onerror=document.title='owned'>")
    assert page.locator("#summary").inner_text().startswith("<img src=x")
    assert page.locator(".name", has_text="onerror").count() == 1
    assert "owned" not in page.title() or page.title().startswith("<img")
    assert page.locator("#results img:not(.shot img)").count() == 0


@pytest.mark.parametrize(
    ("name", "how"), [("red then green.mp4", "direct"), ("copied.mkv", "copied"), ("old.avi", "converted")]
)
def test_the_player_starts_at_the_moment(site, open_page, ids, name, how) -> None:
    page = open_page(site.address)
    search(page, "a red thing")
    hits = site.post("/api/search", {"text": "a red thing", "top_k": 24}).json["hits"]
    hit = next(hit for hit in hits if hit["path"].endswith(name))
    page.locator(f".card[data-video='{hit['video_id']}'] .open").click()
    until(
        page, "document.querySelector('#video').currentTime > 0 && !document.querySelector('#video').paused"
    )
    source = site.get(
        f"/api/videos/{hit['video_id']}/playback?start_s={hit['start_s']}&end_s={hit['end_s']}"
    ).json
    offset = source["offset_s"]
    first = page.evaluate("document.querySelector('#video').currentTime") + offset
    assert hit["start_s"] - 0.1 <= first <= hit["end_s"] + 0.1
    until(page, f"document.querySelector('#video').currentTime > {first - offset + 0.3}")
    frames = page.evaluate("document.querySelector('#video').getVideoPlaybackQuality().totalVideoFrames")
    assert frames > 2
    note = page.locator("#player-note")
    assert note.is_visible() == (how != "direct")
    assert how == "direct" or how in note.inner_text()
    duration = site.get(f"/api/videos/{hit['video_id']}").json["duration_s"]
    left, width = page.evaluate(
        "[...['left', 'width']].map(side => parseFloat(document.querySelector('#segment').style[side]))"
    )
    assert left == pytest.approx(100 * hit["start_s"] / duration, abs=0.5)
    assert width == pytest.approx(100 * (hit["end_s"] - hit["start_s"]) / duration, abs=0.5)
    page.keyboard.press("Escape")
    until(page, "!document.querySelector('#player').open")
    assert page.evaluate("document.activeElement.classList.contains('open')")  # back where one was


def test_the_timeline_obeys_the_keyboard(site, open_page, ids) -> None:
    page = open_page(site.address)
    search(page, "a red thing")
    page.locator(f".card[data-video='{ids['red']}'] .open").click()
    until(page, "document.querySelector('#video').currentTime > 0")
    timeline = page.get_by_role("slider", name="Position in the whole video")
    timeline.focus()
    page.evaluate("document.querySelector('#video').pause()")
    page.keyboard.press("Home")
    until(page, "document.querySelector('#video').currentTime === 0")
    page.keyboard.press("ArrowRight")
    until(page, "Math.abs(document.querySelector('#video').currentTime - 1) < 0.01")
    assert timeline.get_attribute("aria-valuetext") == "0:01 of 0:20"


def test_filters_narrow_and_clear(site, open_page) -> None:
    page = open_page(site.address)
    search(page, "blue")
    page.get_by_role("button", name="Filters").click()
    page.get_by_label("Longer than").fill("9")
    page.get_by_label("Longer than").press("Enter")
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 3")
    assert page.locator("#filter-count").inner_text() == "1"
    assert "min=9" in page.url
    page.get_by_label("Name contains").fill("it's")
    page.get_by_label("Name contains").press("Enter")
    page.wait_for_selector(".state:not([hidden])")
    assert "No video passes these filters" in page.locator("#state").inner_text()
    page.locator("#state").get_by_role("button", name="Clear filters").click()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 6")
    page.go_back()
    page.wait_for_selector(".state:not([hidden])")


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_a_dropped_file_is_searched_by(site, open_page, films, tmp_path, kind) -> None:
    path = films / "blue.mp4"
    if kind == "picture":
        path = tmp_path / "red.png"
        Image.fromarray(np.full((40, 60, 3), (220, 20, 20), np.uint8)).save(path)
    page = open_page(site.address)
    page.set_input_files("#file", path)
    page.wait_for_selector(".card:not(.skeleton)")
    assert page.locator("#chip-text").inner_text() == path.name
    assert page.locator("#summary").inner_text() == f"Moments like {path.name}"
    best = Client(site.address).search(path, top_k=1)[0].video_id
    assert cards(page).first.get_attribute("data-video") == best
    page.get_by_role("button", name="Remove this query").click()
    assert page.evaluate("document.body.dataset.view") == "home"


def test_more_like_this_leaves_the_video_out(site, open_page, ids) -> None:
    page = open_page(site.address)
    search(page, "green")
    page.locator(f".card[data-video='{ids['copied']}'] .like").click()
    until(page, "document.querySelector('#summary').textContent.startsWith('Moments like copied.mkv')")
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 5")
    assert page.locator(f".card[data-video='{ids['copied']}']").count() == 0
    page.reload()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 5")


def test_hits_say_how_strong_they_are_and_the_weak_can_be_left_out(site, open_page) -> None:
    page = open_page(site.address)
    search(page, "a red thing")
    hits = site.post("/api/search", {"text": "a red thing", "top_k": 24}).json["hits"]
    words = {"strong": "strong", "weak": "weak", "unrelated": "no better than unrelated text"}
    assert page.locator(".card .strength").all_inner_texts() == [words[hit["strength"]] for hit in hits]
    page.locator("#toggle-filters").click()
    for least in ("weak", "strong"):
        kept = site.post("/api/search", {"text": "a red thing", "min_strength": least}).json["hits"]
        page.locator("#f-strength").select_option(least)
        page.wait_for_selector(".card:not(.skeleton), .state:not([hidden])")
        until(page, f"document.querySelectorAll('.card:not(.skeleton)').length === {len(kept)}")
        if not kept:
            assert "unrelated texts" in page.locator("#state").inner_text()


def test_not_this_one_leaves_a_video_out(site, open_page, ids) -> None:
    page = open_page(site.address)
    search(page, "a red thing")
    page.locator(f".card[data-video='{ids['red']}'] .unlike").click()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 5")
    assert page.locator(f".card[data-video='{ids['red']}']").count() == 0
    page.locator(f".card[data-video='{ids['blue']}'] .like").click()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 5")
    page.locator(f".card[data-video='{ids['grey']}'] .unlike").click()
    until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 4")
    assert page.locator(f".card[data-video='{ids['blue']}']").count() == 0  # nor the one that was asked about


def test_the_pointer_looks_into_a_moment(site, open_page, ids) -> None:
    page = open_page(site.address)
    search(page, "red")
    shot = page.locator(f".card[data-video='{ids['red']}'] .shot")
    box = shot.bounding_box()
    page.mouse.move(box["x"] + 4, box["y"] + 40)
    page.mouse.move(box["x"] + 8, box["y"] + 40)
    page.wait_for_selector(f".card[data-video='{ids['red']}'] .strip.on")
    place = f"document.querySelector(\".card[data-video='{ids['red']}'] .strip\").style.backgroundPosition"
    first = page.evaluate(place)
    page.mouse.move(box["x"] + box["width"] - 6, box["y"] + 40)
    until(page, f"{place} !== '{first}'")
    assert page.evaluate(place).startswith("100%")
    page.mouse.move(2, 2)
    until(page, "!document.querySelector('.strip.on')")


def test_more_moments_are_shown_on_demand(
    serving_pages, model, model_source, write_clip, open_page, tmp_path
) -> None:
    from vlm.retrieval import VideoIndex

    for number in range(27):
        write_clip(tmp_path / "films" / f"{number}.mp4", [(("red", "green", "blue")[number % 3], 0.3)])
    VideoIndex.create(tmp_path / "index", model, source=model_source).add([tmp_path / "films"], model=model)
    with serving_pages(tmp_path / "index", tmp_path / "cache") as site:
        page = open_page(site.address)
        search(page, "red")
        assert cards(page).count() == 24
        page.get_by_role("button", name="Show more").click()
        until(page, "document.querySelectorAll('.card:not(.skeleton)').length === 27")
        assert not page.locator("#more").is_visible()
        shown = page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.video)")
        assert len(set(shown)) == 27
        assert page.evaluate("document.activeElement.closest('.card').dataset.video") == shown[24]


def test_a_question_is_answered_with_its_moment(site, open_page) -> None:
    page = open_page(site.address)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_label("Question").fill("which colour is it")
    page.get_by_label("Possible answers, one a line").fill("red\nblue")
    page.locator("#submit").click()
    page.wait_for_selector(".answer .said")
    reply = site.post("/api/ask", {"question": "which colour is it", "choices": ["red", "blue"]}).json
    assert page.locator(".said").inner_text() == reply["answer"]
    page.locator("#answer .open").click()
    until(page, "document.querySelector('#video').currentTime > 0")


def test_errors_are_told_and_can_be_tried_again(site, open_page, tmp_path) -> None:
    page = open_page(site.address, allowed="422|Failed to load|ERR_FAILED")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "bad.png")
    page.wait_for_selector(".state.bad:not([hidden])")
    assert "cannot be read as an image" in page.locator("#state").inner_text()
    page.route("**/api/search", lambda route: route.abort())
    page.get_by_role("button", name="Remove this query").click()
    page.get_by_role("searchbox").fill("red")
    page.get_by_role("searchbox").press("Enter")
    page.wait_for_selector(".state.bad:not([hidden]) h3:has-text('No connection')")
    page.unroute("**/api/search")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".card:not(.skeleton)")


def test_a_token_is_asked_for_once(index, serving_pages, open_page, token, tmp_path) -> None:
    with serving_pages(index, tmp_path / "cache", token=token) as site:
        page = open_page(site.address, allowed="401")
        page.get_by_role("textbox", name="Token").fill("not the token at all")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector("#login-error:has-text('not the token')")
        page.get_by_role("textbox", name="Token").fill(token)
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector("#stats:has-text('6 videos')")
        search(page, "red")
        until(page, "[...document.querySelectorAll('.shot img')].some(image => image.naturalWidth)")
        page.reload()
        page.wait_for_selector(".card:not(.skeleton)")
        assert page.evaluate("document.cookie") == ""


def test_a_folder_is_added_from_the_page(
    serving_pages, model, model_source, write_clip, open_page, tmp_path
) -> None:
    from vlm.retrieval import VideoIndex

    write_clip(tmp_path / "more" / "new.mp4", [("blue", 1)])
    VideoIndex.create(tmp_path / "index", model, source=model_source)
    folders = {"holidays": tmp_path / "more"}
    with serving_pages(tmp_path / "index", tmp_path / "cache", ingest_folders=folders) as site:
        page = open_page(site.address)
        assert "No videos yet" in page.locator("#state").inner_text()
        page.get_by_role("button", name="Add videos").click()
        page.get_by_role("button", name="Index holidays").click()
        page.wait_for_selector("#jobs:has-text('1 added')", timeout=60_000)
        page.keyboard.press("Escape")
        page.wait_for_selector("#stats:has-text('1 video')")


def test_a_narrow_model_is_announced(serving_pages, films, tmp_path, open_page) -> None:
    from vlm.models import load_model
    from vlm.retrieval import VideoIndex

    demo = load_model("demo")
    index = VideoIndex.create(tmp_path / "index", demo)
    index.add([films / "blue.mp4"], model=demo, allow_narrow_model=True)
    with serving_pages(tmp_path / "index", tmp_path / "cache", model=demo) as site:
        page = open_page(site.address)
        assert "knows only the digit world" in page.locator("#domain").inner_text()
        search(page, "a red 3")
        assert "not to be trusted" in cards(page).first.inner_text()
