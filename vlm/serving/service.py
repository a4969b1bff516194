"""What the service does, free of HTTP: encode once, search in threads, go on to new generations."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from vlm.answering import Choices, decode_evidence, find_evidence, judge, state_choices
from vlm.errors import InvalidInput
from vlm.retrieval.filters import parse_filter
from vlm.retrieval.queries.encoding import QueryEncoder
from vlm.retrieval.queries.mixing import EncodedQuery
from vlm.retrieval.queries.options import SearchOptions
from vlm.retrieval.queries.searching import SnapshotSearcher
from vlm.retrieval.queries.values import Clip, Mix, Moment, Part
from vlm.retrieval.strength import TextBank
from vlm.serving.library import Library
from vlm.serving.settings import Limits
from vlm.serving.transport.admission import Gate
from vlm.serving.transport.metrics import Metrics
from vlm.serving.transport.problems import NotFound, Problem
from vlm.types import Hit, VideoTextEncoder

Result = TypeVar("Result")
_LOG = logging.getLogger("vlm.serving")
_KEPT_QUERIES = 1024
_ALONE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some hits of a search.

    Attributes:
        hits: Ranked over the whole search, not from the page's start.
        generation: Of the index; pages of one search that name different generations may overlap.
        next_offset: Where the next page begins; None if there is none.
        query_id: Names the encoded query, so that the next page needs no upload.
        unknown_words: Words of a text that the model cannot understand.
        notes: What else is worth telling, such as that a text was cut.
    """

    hits: tuple[Hit, ...]
    generation: int
    next_offset: int | None
    query_id: str
    unknown_words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedPart:
    """A part of a sum: a text, a query that was encoded before, or a moment; and its weight."""

    weight: float = 1.0
    text: str | None = None
    query_id: str | None = None
    moment: Moment | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known:
    """An encoded query, what was said while it was encoded, and the video that none of its pages shows."""

    encoded: EncodedQuery
    unknown_words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    without: str | None = None


class SearchService:
    """One index and its model, for many requests at once.

    The model runs in one thread, whatever asks for it; searches that need no model run beside it, and so does
    the decoding of what it is to see.

    Args:
        place: The index, or the URI of a published store.
        model: The model that made it.
        backend: As for `Searcher`; ``lance`` for a store.
        limits: How much at once.
        metrics: Where stages and counts are noted.
    """

    def __init__(
        self, place: Path | str, model: VideoTextEncoder, *, backend: str, limits: Limits, metrics: Metrics
    ) -> None:
        self.model, self.limits = model, limits
        self._place, self._backend, self._metrics = place, backend, metrics
        line = limits.max_waiting, limits.timeout_s, limits.max_wait_s
        self.encoder = Gate("encoding", 1, *line)
        self.decoder = Gate("decoding", limits.num_decoders, limits.max_waiting, limits.timeout_s)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._bank = TextBank(model)
        # here, while nobody else uses the model
        self._bank.embeddings()
        self._refreshing = threading.Lock()
        self._renewing: threading.Thread | None = None
        self._not_renewed = -1
        self.library = library = self._open()
        # of what is neither shared nor waited for elsewhere, Python does one thing at a time, beside one pass
        is_alone = not (library.is_store or library.searcher.shares_passes)
        num_searches = min(limits.num_searches, _ALONE) if is_alone else limits.num_searches
        self.scanner = Gate("searching", num_searches, *line)

    def close(self) -> None:
        """Take no more work."""
        self.decoder.close()
        self.encoder.close()
        self.scanner.close()

    def refresh(self) -> bool:
        """Go on to the newest generation, if there is one; running requests keep theirs."""
        with self._refreshing:  # or who opened an older one might be the last to end
            if self.library.is_newest():
                return False
            self.library = self.library.newest() or self._open()
            return True

    def try_refresh(self) -> None:
        """Do as `refresh`; if that fails, note it: what is held stays good."""
        try:
            self.refresh()
        except Exception:  # a writer may be in the middle of a repair
            self._metrics.count("index_refresh_failures_total")

    def renew_beside(self) -> None:
        """Begin to make an outgrown search structure anew, beside the searches that the old one still serves.

        Nothing waits for it, not even the end of the service: what it writes is whole or not there.
        """
        library = self.library
        is_under_way = self._renewing is not None and self._renewing.is_alive()
        if is_under_way or not library.is_outgrown or library.generation == self._not_renewed:
            return
        self._renewing = threading.Thread(target=self._renew, args=(library,), name="renewing", daemon=True)
        self._renewing.start()

    def _renew(self, library: Library) -> None:
        try:
            renewed = library.renewed()
            with self._refreshing:
                # more may have come meanwhile; after a compaction, whoever refreshes opens all again
                self.library = renewed.newest() or self.library
        except Exception:  # such as too little memory: the next generation may fare better
            _LOG.exception("the search structure was not made anew; the one before serves on")
            self._not_renewed = library.generation
            self._metrics.count("index_renewal_failures_total")

    def _open(self) -> Library:
        return Library.open(self._place, self.model, self._backend, self._bank, self.encoder.run_within)

    async def follow(self, every_s: float = 1.0) -> None:
        """Keep going on to new generations until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.try_refresh)
            self.renew_beside()

    async def search(
        self,
        query: str | None,
        query_id: str | None,
        parts: Sequence[NamedPart] = (),
        *,
        options: SearchOptions,
    ) -> Page:
        """Search by a text, by a query that was encoded before, or by a sum of those and of moments.

        Raises:
            Problem: A query is not known any more (410).
            InvalidInput: The filter or a number cannot be used.
            BusyError: Too many at once.
        """
        if options.where is not None:
            parse_filter(options.where)
        library = self.library
        for moment in options.unlike:
            library.video(moment.video_id)
        if query is not None:
            query_id, known = await self._encoded("text", query.encode(), query, library.searcher)
        elif parts:
            mix = Mix(tuple(self._part(part, library) for part in parts))
            query_id, known = await self._encoded("mix", repr(parts).encode(), mix, library.searcher)
        else:
            known = self._remembered(query_id or "")
        return await self._page(library, known, query_id or "", options)

    def _part(self, part: NamedPart, library: Library) -> Part:
        if part.text is not None:
            return Part(part.text, part.weight)
        if part.query_id is not None:
            return Part(self._remembered(part.query_id).encoded, part.weight)
        assert part.moment is not None
        library.video(part.moment.video_id)
        return Part(part.moment, part.weight)

    async def search_upload(
        self, kind: str, digest: bytes, query: Path | np.ndarray, *, top_k: int, where: str | None
    ) -> Page:
        """Search by an uploaded picture or video; `digest` is the hash of its bytes."""
        if where is not None:
            parse_filter(where)
        library = self.library
        query_id, known = await self._encoded(kind, digest, query, library.searcher)
        return await self._page(library, known, query_id, SearchOptions(top_k=top_k, where=where))

    async def similar(
        self, video_id: str, start_s: float, *, top_k: int, offset: int, where: str | None
    ) -> Page:
        """Return moments of other videos that are like an indexed one."""
        if where is not None:
            parse_filter(where)
        library = self.library
        library.video(video_id)
        encoded = await self.scanner.run(library.searcher.encode_segment, video_id, start_s)
        known = _Known(encoded=encoded, without=video_id)
        query_id = self._remember(f"similar {video_id} {start_s!r}".encode(), known)
        options = SearchOptions(top_k=top_k, offset=offset, where=where)
        return await self._page(library, known, query_id, options)

    async def ask(
        self, question: str, choices: Sequence[str] | None, video_id: str | None
    ) -> tuple[Choices | None, Hit, tuple[str, ...]]:
        """Return the judged choices, the moment that shows the answer, and the words nobody understood.

        Without choices there is no answer, only the moment.
        """
        library = self.library
        if video_id is not None:
            library.video(video_id)
        searcher = library.searcher

        async def answer() -> tuple[Choices | None, Hit]:
            claims = [question] if choices is None else state_choices(self.model, question, choices)
            encode = partial(_quiet, lambda: [searcher.encode(claim) for claim in claims])
            encoded = await self.encoder.run(encode)
            find = partial(find_evidence, searcher, encoded, video=video_id)
            hit = await self._reranking(library).run(find)
            if choices is None:
                return None, hit
            frames = await self.decoder.run(decode_evidence, searcher, hit)
            judged = partial(judge, self.model, question, choices, hit, frames)
            return await self.encoder.run(_quiet, judged), hit

        if not library.videos:
            raise NotFound("video: the index is empty")
        chosen, hit = await self._timed("ask", answer())
        words = [word for text in (question, *(choices or ())) for word in searcher.unknown_words(text)]
        return chosen, hit, tuple(dict.fromkeys(words))

    async def _page(self, library: Library, known: _Known, query_id: str, options: SearchOptions) -> Page:
        end = options.offset + options.top_k
        if end > self.limits.max_top_k:
            raise InvalidInput(f"expected offset + top_k <= {self.limits.max_top_k}, got {end}")
        if known.without is not None:
            others = "" if options.where is None else f" and ({options.where})"
            options = replace(options, where=f"video_id != '{known.without}'{others}")
        gate, stage = (self._reranking(library), "rerank") if options.rerank else (self.scanner, "scan")
        scan = gate.run(library.searcher.page, known.encoded, options)
        hits, has_more = await self._timed(stage, scan)
        return Page(
            hits=tuple(hits),
            generation=library.generation,
            next_offset=end if has_more and end < self.limits.max_top_k else None,
            query_id=query_id,
            unknown_words=known.unknown_words,
            notes=known.notes,
        )

    def _reranking(self, library: Library) -> Gate:
        """Return where to rerank: the matching head is the model's, which has one thread.

        Texts must not wait there for decoding.
        """
        return self.decoder if library.decodes_to_rerank else self.encoder

    async def _encoded(
        self, kind: str, content: bytes, query: str | Path | np.ndarray | Mix, searcher: SnapshotSearcher
    ) -> tuple[str, _Known]:
        # the model's work would be in vain
        self.scanner.check()
        key = _key(kind.encode() + b"\0" + content)
        known = self._known.get(key)
        self._metrics.count("query_cache_total", result="miss" if known is None else "hit", kind=kind)
        if known is not None:
            self._known.move_to_end(key)
            return key, known

        ready = query if not isinstance(query, Path) else await self._decoded(query)
        known = await self._timed("encode", self.encoder.run(_encode, searcher, ready))
        return self._remember(kind.encode() + b"\0" + content, known), known

    async def _decoded(self, path: Path) -> Clip:
        # decoding would be in vain, too
        self.encoder.check()
        return await self._timed("decode", self.decoder.run(QueryEncoder(self.model).decode, path))

    def _remember(self, content: bytes, known: _Known) -> str:
        key = _key(content)
        self._known[key] = known
        while len(self._known) > _KEPT_QUERIES:
            self._known.popitem(last=False)
        return key

    def _remembered(self, query_id: str) -> _Known:
        known = self._known.get(query_id)
        if known is None:
            raise Problem(410, "query_gone", "this query is not remembered any more; send it again")
        return known

    async def _timed(self, stage: str, work: Awaitable[Result]) -> Result:
        started = time.perf_counter()
        try:
            return await work
        finally:
            self._metrics.observe("search_stage_seconds", time.perf_counter() - started, stage=stage)


def _encode(searcher: SnapshotSearcher, query: str | Clip | np.ndarray | Mix) -> _Known:
    notes: list[str] = []
    encoded = _quiet(lambda: searcher.encode(query), notes)
    texts = [part.query for part in query.parts] if isinstance(query, Mix) else [query]
    words = [word for text in texts if isinstance(text, str) for word in searcher.unknown_words(text)]
    words = list(dict.fromkeys(words)) if isinstance(query, Mix) else words
    return _Known(encoded=encoded, unknown_words=tuple(words), notes=tuple(notes))


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _quiet(work: Callable[[], Result], notes: list[str] | None = None) -> Result:
    """Run with warnings caught and noted; only the encoder's thread does this, as it is not for several."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    if notes is not None:
        notes += [str(warning.message) for warning in caught]
    return result
