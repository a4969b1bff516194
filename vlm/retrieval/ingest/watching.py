"""Watch folders and keep their index in line with them, without ever emptying it by mistake."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import InvalidInput
from vlm.retrieval.catalog import Catalog, Changes
from vlm.retrieval.ingest.adding import add_files
from vlm.retrieval.ingest.presence import Look, Places
from vlm.retrieval.reports import Report, report_of
from vlm.types import VideoTextEncoder

if TYPE_CHECKING:
    from vlm.retrieval.index import VideoIndex


class Watcher:
    """Looks again and again, and brings in what has stayed the same from one look to the next.

    Nothing is locked between rounds. A file that was rejected is tried again when its size or modification
    time is another; that is kept in the index, so that it holds over restarts.

    Attributes:
        failures: How many rounds failed, by the error's class.
        is_waiting: Whether something was seen to change that has not been brought in yet.
    """

    def __init__(
        self,
        index: VideoIndex,
        load: Callable[[], VideoTextEncoder],
        paths: Iterable[Path | str] = (),
        *,
        say: Callable[[str], object],
        sleep: Callable[[float], object] = time.sleep,
        **options: Any,
    ) -> None:
        """Prepare to watch what was ever added to an index, and more.

        Args:
            index: The index.
            load: Gives the index's model; called once, when there is something to embed or remove.
            paths: Further files and folders; they belong to the index from the first round on.
            say: Takes a line about the state of things: folders that are away or back, rounds that failed.
            sleep: Waits for so many seconds.
            **options: Of `vlm.retrieval.ingest.adding.add_files`: batch size, processes, patience, domain.

        Raises:
            InvalidInput: One of `paths` does not exist and was never added.
        """
        self._index, self._load, self._say, self._sleep = index, load, say, sleep
        self._options = options
        self._paths = [Path(os.path.abspath(path)) for path in paths]
        with index.held() as catalog:
            roots = catalog.roots()
        for path in self._paths:
            if not os.path.lexists(path) and os.fsencode(path) not in roots:
                raise InvalidInput(f"{os.fspath(path)!r}: no such file or folder; watch one that is there")
        if not self._paths and not roots:
            raise InvalidInput(f"{index.folder}: nothing was ever added to it; name the folders to watch")
        self._places = Places(index.folder)
        self._model: VideoTextEncoder | None = None
        self._before = Look()
        self._last_error: str | None = None
        self.failures: Counter[str] = Counter()
        self.is_waiting = False

    def load_model(self) -> VideoTextEncoder:
        """Return the model, loaded at the first call.

        Raises:
            InvalidInput: It is not the one that made the index.
        """
        if self._model is None:
            model = self._load()
            self._index.check_model(model)
            self._model = model
        return self._model

    def run(self, done: Callable[[Report], object], every_s: float = 60.0, settle_s: float = 5.0) -> None:
        """Go on until interrupted; an error ends a round, not the watch.

        Args:
            done: Takes the report of each round that changed something.
            every_s: From the end of one round to the next look, in seconds.
            settle_s: The same after the very first look, if that is less.
        """
        pause = min(settle_s, every_s)
        while True:
            try:
                report = self.round()
            except Exception as error:
                self._count(error)
            else:
                if self._last_error is not None:
                    counts = ", ".join(f"{count} {reason}" for reason, count in self.failures.items())
                    self._say(f"it works again; rounds that failed so far: {counts}")
                    self._last_error = None
                if report is not None:
                    done(report)
            self._sleep(pause)
            pause = every_s

    def once(self, settle_s: float = 5.0) -> Report:
        """Bring in what stays the same for `settle_s` seconds; look only once if nothing changed.

        Raises:
            BusyError: Somebody else is writing this index.
            VlmError: As adding does.
        """
        report = self.round()
        if report is None and self.is_waiting:
            self._sleep(settle_s)
            report = self.round()
        return report or Report()

    def round(self) -> Report | None:
        """Look, and bring in what is as it was at the look before.

        Returns:
            What was done; None if there was nothing to do.

        Raises:
            BusyError: Somebody else is writing this index; the next round tries again.
            VlmError: As adding does.
        """
        self._index.refresh()
        with self._index.held() as catalog:
            roots, seen = catalog.roots(), catalog.seen()
            rejected = {r.path for r in catalog.rejections(self._index.snapshot.generation.id)}
        indexed = {video.path for video in self._index.snapshot.videos}
        places = {Path(os.fsdecode(root)) for root in roots}.union(self._paths)
        look = self._places.look(places, {Path(os.fsdecode(path)) for path in indexed | rejected})
        self._tell(look)
        before, self._before = self._before, look
        changed = []
        for file, state in look.states.items():
            path = os.fsencode(file)
            *was, sha256 = seen.get(path, (0, 0, ""))
            # a rejected file whose content has a hash was not rejected here: its vectors were lost
            is_known = path in indexed or (path in rejected and path in seen and not sha256)
            if not is_known or tuple(was) != state:
                changed.append(file)
        ready = [file for file in changed if before.states.get(file) == look.states[file]]
        gone = look.gone & before.gone
        self.is_waiting = len(ready) < len(changed) or len(gone) < len(look.gone)
        new_roots = [os.fsencode(path) for path in self._paths if os.fsencode(path) not in roots]
        if not (ready or gone or new_roots):
            return None
        return self._bring_in(look, ready, gone, new_roots)

    def _bring_in(
        self, look: Look, files: list[Path], gone: set[Path], new_roots: list[bytes]
    ) -> Report | None:
        started, report = time.monotonic(), None
        model = self.load_model() if files or gone else None
        with self._index.writing() as catalog:
            new_roots = [root for root in dict.fromkeys(new_roots) if root not in catalog.roots()]
            if new_roots:
                catalog.commit(Changes(roots=new_roots))
            if model is not None:
                outcome, plan = add_files(
                    catalog,
                    self._index.log,
                    self._index.manifest,
                    model,
                    sorted(files, key=os.fsencode),
                    drop_gone=frozenset(map(os.fsencode, gone)),
                    **self._options,
                )
                report = report_of(outcome, plan, {}, time.monotonic() - started)
                _remember_rejected(catalog, report, look)
        self._index.refresh()
        return report

    def _tell(self, look: Look) -> None:
        """Say which places went away or came back since the look before."""
        was = self._before.away
        for place, reason in look.away.items():
            if was.get(place) != reason:
                kept = look.num_kept[place]
                stay = f"; {kept} files that lay there stay in the index" if kept else ""
                self._say(f"{place}: {reason}{stay}")
        for place in was:
            if place not in look.away:
                self._say(f"{place}: there again")

    def _count(self, error: Exception) -> None:
        """Count a failed round; say why, unless it is what was said last."""
        reason, text = type(error).__name__, str(error)
        self.failures[reason] += 1
        if text != self._last_error:
            self._last_error = text
            self._say(f"a round failed ({reason}: {text}); it is tried again")


def _remember_rejected(catalog: Catalog, report: Report, look: Look) -> None:
    """Note how the rejected files looked before they were tried."""
    states = {os.fsencode(file): state for file, state in look.states.items()}
    seen = [(item.path, *states[item.path], "") for item in report.rejected if item.path in states]
    if seen:
        catalog.commit(Changes(seen=seen))
