"""The parts of a running service, made once and handed to every request."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from vlm.errors import InvalidInput, UsageError
from vlm.retrieval.catalog import Generation
from vlm.retrieval.quality.starring import KnownItemFile
from vlm.retrieval.store.tables import local_folder
from vlm.serving.ingest.jobs import IngestJobs
from vlm.serving.library import LANCE
from vlm.serving.media.cache import FileCache
from vlm.serving.media.pool import MediaWorkers
from vlm.serving.service import SearchService
from vlm.serving.settings import Limits, ServeSettings
from vlm.serving.transport.admission import Gate
from vlm.serving.transport.metrics import Labels, Metrics
from vlm.serving.transport.security import Sessions
from vlm.types import VideoTextEncoder


@dataclass(kw_only=True)
class State:
    """What requests work with.

    Attributes:
        settings: As the owner wants it.
        service: Searches and answers.
        jobs: Indexes.
        workers: Processes that open files of unknown origin.
        media: Who may use them.
        cache: Pictures and clips.
        known: Starred hits; None if the owner wants none kept.
        sessions: Who may ask.
        metrics: What happened.
        uploads: Where bodies lie while they are used; gone when the service ends.
        num_uploads: Bodies that are being received or used.
        is_draining: No longer ready for new work.
    """

    settings: ServeSettings
    service: SearchService
    jobs: IngestJobs
    workers: MediaWorkers
    media: Gate
    cache: FileCache
    known: KnownItemFile | None
    sessions: Sessions
    metrics: Metrics
    uploads: Path
    num_uploads: int = 0
    is_draining: bool = field(default=False)

    @property
    def limits(self) -> Limits:
        """What a request may cost."""
        return self.settings.limits

    def close(self) -> None:
        """End the processes and threads, and remove what was uploaded."""
        self.is_draining = True
        self.media.close()
        self.service.close()
        self.workers.close()
        self.jobs.close()
        shutil.rmtree(self.uploads, ignore_errors=True)


def open_state(
    index: Path | str, model: VideoTextEncoder, source: str, settings: ServeSettings, backend: str = "auto"
) -> State:
    """Open an index, or a published store, for serving.

    Args:
        index: Its folder; the store's URI.
        model: The model that made it.
        source: Where `load_model` finds that model again, for the process that indexes.
        settings: As the owner wants it.
        backend: As for `Searcher`; ``lance`` for a store.

    Raises:
        InvalidInput: There is no index, or another model made it.
        IntegrityError: It is damaged.
        UsageError: See `check_for_store`.
        MissingExtra: A store needs lancedb.
    """
    if backend == LANCE:
        check_for_store(str(index), settings)
    metrics, limits = Metrics(), settings.limits
    service = SearchService(index, model, backend=backend, limits=limits, metrics=metrics)
    state = State(
        settings=settings,
        service=service,
        jobs=IngestJobs(
            Path(index),
            source,
            settings.ingest_folders,
            settings.allow_narrow_model,
            metrics,
            service.try_refresh,
        ),
        workers=MediaWorkers(),
        media=Gate("media", limits.num_media_workers, limits.max_waiting, limits.media_timeout_s),
        cache=FileCache(settings.cache_folder, settings.cache_bytes),
        known=None
        if settings.queries_file is None
        else KnownItemFile(settings.queries_file, limits.max_known),
        sessions=Sessions(settings.token),
        metrics=metrics,
        uploads=Path(tempfile.mkdtemp(prefix="vlm-uploads-")),
    )
    _watch(state)
    return state


def check_for_store(uri: str, settings: ServeSettings) -> None:
    """Check that a store can be served so: nothing is ever written into it.

    Raises:
        UsageError: Clients were to have folders indexed.
        InvalidInput: The cache would lie in the store.
    """
    if settings.ingest_folders:
        raise UsageError(
            f"{uri} is a published store, into which nothing is indexed: leave --ingest out, and run "
            "vlm index publish again after adding to the index"
        )
    folder = local_folder(uri)
    cache = Path(os.path.realpath(settings.cache_folder))
    if folder is not None and cache.is_relative_to(os.path.realpath(folder)):
        raise InvalidInput(f"{cache}: expected a cache outside the store {uri}; choose another with --cache")


def state_of(request: Request) -> State:
    """Return the state of the application that a request came to."""
    state: State = request.app.state.vlm
    return state


def _watch(state: State) -> None:
    """Have the metrics tell how things stand."""

    def single(value: float) -> list[tuple[Labels, float]]:
        return [((), value)]

    gauge, service = state.metrics.gauge, state.service

    def generation() -> Generation:
        return service.library.searcher.snapshot.generation

    gauge("index_generation", lambda: single(service.library.generation))
    gauge("index_videos", lambda: single(generation().num_videos))
    gauge("index_segments", lambda: single(generation().num_segments))
    gauge("index_rejected", lambda: single(generation().num_rejected))
    gates = (service.encoder, service.decoder, service.scanner, state.media)
    gauge("queue_depth", lambda: [((("queue", gate.name),), gate.depth) for gate in gates])
    gauge("media_cache_bytes", lambda: single(state.cache.size_bytes))
    gauge("uploads", lambda: single(state.num_uploads))
