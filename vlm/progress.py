"""Progress of long work on stderr, with rate and remaining time; quiet lines when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from tqdm.std import tqdm as Bar

Item = TypeVar("Item")
_SECONDS_BETWEEN_PLAIN_LINES = 30.0


def progress_bar(total: int | None, description: str, unit: str = "item", initial: int = 0) -> Bar[None]:
    """Return a bar to ``update`` and ``close`` (or use as a context manager).

    On a terminal it redraws in place; elsewhere it prints a line at most every 30 seconds.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        dynamic_ncols=watched,
        mininterval=0.1 if watched else _SECONDS_BETWEEN_PLAIN_LINES,
        leave=True,
    )


def track(
    items: Iterable[Item], description: str, total: int | None = None, unit: str = "item"
) -> Iterator[Item]:
    """Yield ``items`` while showing how many are done, how fast, and how long the rest will take."""
    with progress_bar(total if total is not None else _length(items), description, unit) as bar:
        for item in items:
            yield item
            bar.update()


def _length(items: Iterable[object]) -> int | None:
    return len(items) if hasattr(items, "__len__") else None
