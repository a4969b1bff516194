"""What people do with the page, for the tests that drive it."""

from __future__ import annotations

import time

SIZES = {"desktop": (1280, 800), "phone": (360, 740)}


def until(page, expression: str, seconds: float = 15) -> None:
    """Wait for something to be true; Playwright's own way would evaluate it in a page that forbids this."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(30)


def search(page, text: str) -> None:
    page.get_by_role("searchbox").fill(text)
    page.get_by_role("searchbox").press("Enter")
    page.wait_for_selector(".card:not(.skeleton), .state:not([hidden])")


def cards(page):
    return page.locator(".card:not(.skeleton)")
