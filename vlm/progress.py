"""Progress of long work on stderr, with rate and remaining time; quiet lines when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from tqdm.std import tqdm as Bar

Item = TypeVar("Item")
Listener = Callable[[str, float, float | None], object]
_listeners: list[Listener] = []
_SECONDS_BETWEEN_REDRAWS = 0.1
_SECONDS_BETWEEN_PLAIN_LINES = 30.0


def progress_bar(
    total: float | None, description: str, unit: str = "item", initial: int = 0, unit_scale: bool = False
) -> Bar[None]:
    """Return a bar to ``update`` and ``close`` (or use as a context manager).

    On a terminal it redraws in place; elsewhere it prints whole lines, at most one every 30 seconds.

    Args:
        total: Units of work, or None if unknown.
        description: What is being done.
        unit: Name of one unit; ``B`` with ``unit_scale`` for bytes.
        initial: Units that were done before, as in a resumed download.
        unit_scale: Print 12.3M for 12300000.
    """
    watched = sys.stderr.isatty()
    seconds = _SECONDS_BETWEEN_REDRAWS if watched else _SECONDS_BETWEEN_PLAIN_LINES
    for listener in _listeners:
        listener(description, initial, total)
    return _QuietTqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        initial=initial,
        file=sys.stderr if watched else _Lines(sys.stderr),
        dynamic_ncols=watched,
        mininterval=seconds,
        maxinterval=seconds,
        miniters=1,
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


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call ``listener(description, done, total)`` at every bar's start and step, for programs that watch."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class _QuietTqdm(tqdm):  # type: ignore[type-arg]
    """A bar without tqdm's watching thread, which would have to survive forks and outlive the bar."""

    monitor_interval = 0

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        for listener in _listeners:
            listener(self.desc, self.n, self.total)
        return shown


class _Lines:
    """A stream that turns redraws into whole lines, so that a log file stays readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip()
        if line:
            self._stream.write(line + "\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _length(items: Iterable[object]) -> int | None:
    return len(items) if isinstance(items, Sized) else None


def printable(text: str) -> str:
    """Return a text with control characters escaped: a file's name must not repaint the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
