"""Queries into hits: embed, find the nearest segments, rerank, merge by video."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlm.data.decoding.image import read_image
from vlm.errors import BusyError, CapabilityError, DataError, InvalidInput
from vlm.retrieval.backends import Backend, open_backend
from vlm.retrieval.backends.texts import embed_everyday_texts
from vlm.retrieval.filters import parse_filter
from vlm.retrieval.index import VideoIndex
from vlm.retrieval.ingest.pool import DecodedSegment, DecodeSettings, Failed, decode_files
from vlm.retrieval.rerank import match_rows
from vlm.text import TruncationWarning
from vlm.types import Hit, TextFeatures, VideoTextEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

Aggregate = Literal["max", "mean"]
MAX_QUERY_CHARACTERS = 20_000
_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_SEGMENTS_PER_HIT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedQuery:
    """A query that has been through the model, to be searched for more than once.

    Attributes:
        vector: (dim,) float32.
        text: The features of a text, which reranking needs; None for pictures and moments.
    """

    vector: np.ndarray
    text: TextFeatures | None = None


if TYPE_CHECKING:
    RawQuery = str | os.PathLike[str] | Image | np.ndarray
    Query = RawQuery | EncodedQuery


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A segment that was found, by its row, and the score that ranks it."""

    row: int
    score: float
    score_kind: str


class Searcher:
    """Searches one generation of an index with the model that made it.

    Args:
        index: The index; `refresh` goes on to its newest generation.
        model: The model that made it.
        backend: ``exact``, ``faiss``, or ``auto``: FAISS if installed. They give the same hits up to 50,000
            segments; beyond, FAISS may miss some, and `VideoIndex.info` states how many.
        around: Called with the backend of each generation, returns what is searched in its place.

    Raises:
        InvalidInput: The index was made by another model.
        CapabilityError: The model cannot search.
    """

    def __init__(
        self,
        index: VideoIndex,
        model: VideoTextEncoder,
        *,
        backend: str = "auto",
        around: Callable[[Backend], Backend] | None = None,
    ) -> None:
        index.check_model(model)
        if "search" not in model.capabilities:
            raise CapabilityError(f"model {model.name!r} ({model.kind}) cannot search")
        self.index, self.model = index, model
        self._backend_name, self._around = backend, around
        self._open()

    def refresh(self) -> None:
        """Go on to the newest generation of the index."""
        before = self.index.snapshot
        if self.index.refresh() is not before:
            self._open()

    def search(
        self,
        query: Query,
        *,
        top_k: int = 10,
        rerank: int = 0,
        where: str | None = None,
        aggregate: Aggregate = "max",
    ) -> list[Hit]:
        """Return the best moments, at most one of each video.

        Args:
            query: A text; an image (PIL, or (h, w, 3) uint8 RGB); the path of an image or video file; or what
                `encode` or `encode_segment` returned.
            top_k: How many videos to return at most.
            rerank: Score this many of the nearest segments again with the matching head (texts only). They
                come first, as ``itm@k``; the others follow by embedding, as ``itc``.
            where: A filter on the videos, for example ``duration_s > 60 and path like '%holiday%'``.
            aggregate: What a video scores: ``max``, as its best segment does (a moment is looked for), or
                ``mean`` over its segments, as ``itc_mean`` (a subject is looked for). Either way the hit
                plays at the best segment.

        Raises:
            InvalidInput: The query is empty, the filter cannot be read, or a number is out of range.
            DataError: The image or video file cannot be read.
            CapabilityError: The model lacks the ability, or the query is not one to rerank.
        """
        if top_k < 1 or rerank < 0:
            raise InvalidInput(f"expected top_k >= 1 and rerank >= 0, got {top_k} and {rerank}")
        has_text = isinstance(query, str) or (isinstance(query, EncodedQuery) and query.text is not None)
        if rerank and not has_text:
            raise CapabilityError("only texts can be reranked: the matching head compares a video and a text")
        if rerank and "rerank" not in self.model.capabilities:
            raise CapabilityError(
                f"model {self.model.name!r} ({self.model.kind}) cannot rerank; leave it out"
            )
        if aggregate not in ("max", "mean") or (rerank and aggregate == "mean"):
            raise InvalidInput(f"expected aggregate max, or mean without rerank, got {aggregate!r}")
        encoded = self.encode(query)
        vector, text = encoded.vector, encoded.text
        allowed = self._allowed(where)
        snapshot = self.index.snapshot
        found: list[_Found] = []
        if rerank and text is not None:
            nearest = self._nearest(vector, rerank, allowed)
            logits = match_rows(self.index, self.model, text, [segment.row for segment in nearest])
            kind = f"itm@{rerank}"
            found = [_Found(row=row, score=score, score_kind=kind) for row, score in logits.items()]
            found.sort(key=lambda segment: (-segment.score, segment.row))
            # a reranked video is ranked by its reranked segments alone
            allowed = allowed & ~np.isin(snapshot.row_video, snapshot.row_video[list(logits)])
        if aggregate == "mean":
            found = self._by_mean(vector, allowed)
        found = self._best_of_each_video(found)[:top_k]
        if len(found) < top_k and aggregate == "max":
            found += self._distinct(vector, top_k - len(found), allowed)
        return [self._hit(rank, segment) for rank, segment in enumerate(found, start=1)]

    def encode(self, query: Query) -> EncodedQuery:
        """Return what a query is compared by; this is the part of a search that runs the model.

        Raises:
            InvalidInput: The query is empty.
            DataError: The image or video file cannot be read.
        """
        vector, text = (query.vector, query.text) if isinstance(query, EncodedQuery) else self._encode(query)
        return EncodedQuery(vector=vector, text=text)

    def encode_segment(self, video_id: str, start_s: float) -> EncodedQuery:
        """Return the stored vector of an indexed segment, to find more like it.

        Args:
            video_id: A video of the index.
            start_s: Where the segment begins, in seconds; the nearest beginning is taken.

        Raises:
            InvalidInput: The index holds no such video.
        """
        snapshot = self.index.snapshot
        video = next((i for i, row in enumerate(snapshot.videos) if row.video_id == video_id), None)
        if video is None:
            raise InvalidInput(f"the index holds no video {video_id!r}")
        rows = np.flatnonzero(snapshot.row_video == video)
        nearest = int(np.argmin(np.abs(snapshot.row_bounds[rows, 0] - start_s)))
        return EncodedQuery(vector=self._vectors.gather(rows[nearest : nearest + 1])[0].astype(np.float32))

    def unknown_words(self, query: str) -> list[str]:
        """Return the words of a text that the model cannot understand."""
        return self.model.unknown_words(query[:MAX_QUERY_CHARACTERS])

    def _open(self) -> None:
        try:
            self._vectors = self.index.vectors()
        except BusyError:  # a compaction came between
            self.index.refresh()
            self._vectors = self.index.vectors()
        backend = open_backend(
            self._backend_name,
            self._vectors,
            self.index.folder / "ann",
            texts=lambda: embed_everyday_texts(self.model),
        )
        self._backend = backend if self._around is None else self._around(backend)

    def _encode(self, query: RawQuery) -> tuple[np.ndarray, TextFeatures | None]:
        """Return the query's vector (dim,) float32, and its text features if it is a text."""
        import torch

        if isinstance(query, str):
            text = self._encode_text(query)
            return text.embedding[0].float().cpu().numpy(), text
        if isinstance(query, os.PathLike):
            path = Path(query)
            is_image = path.suffix.lower() in _IMAGE_SUFFIXES
            clip = self._image_clip(read_image(path)) if is_image else self._video_clip(path)
        else:
            clip = self._image_clip(
                np.asarray(query if isinstance(query, np.ndarray) else query.convert("RGB"))
            )
        with torch.inference_mode():
            features = self.model.encode_video(torch.from_numpy(clip[None]).to(device=self.model.device))
        vector: np.ndarray = features.embedding[0].float().cpu().numpy()
        return vector, None

    def _encode_text(self, query: str) -> TextFeatures:
        import torch

        if not query.strip():
            raise InvalidInput("the query is empty; say what should happen in the video")
        if len(query) > MAX_QUERY_CHARACTERS:
            warnings.warn(
                f"the query has {len(query)} characters; only the first {MAX_QUERY_CHARACTERS} are read",
                TruncationWarning,
                stacklevel=4,
            )
        with torch.inference_mode():
            return self.model.encode_text([query[:MAX_QUERY_CHARACTERS]])

    def _image_clip(self, pixels: np.ndarray) -> np.ndarray:
        from vlm.data.preprocessing import preprocess

        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise InvalidInput(
                f"an image must be uint8 (height, width, 3), got {pixels.dtype} {pixels.shape}"
            )
        clip: np.ndarray = preprocess(pixels[None], self.model.preprocessing).numpy()
        return clip

    def _video_clip(self, path: Path) -> np.ndarray:
        # one clip over the whole file, however long: its gist, not one of its moments
        settings = DecodeSettings(preprocessing=self.model.preprocessing, segment_s=1e9, stride_s=1e9)
        with closing(decode_files([path], settings)) as events:
            for event in events:
                if isinstance(event, DecodedSegment):
                    return event.video
                if isinstance(event, Failed):
                    raise DataError(event.detail, event.reason)
        raise DataError(f"{path}: no frames could be decoded", "no_frames")

    def _allowed(self, where: str | None) -> np.ndarray:
        snapshot = self.index.snapshot
        if where is None:
            return snapshot.alive
        condition = parse_filter(where)
        rows = self.index.rows_where(condition.sql, condition.values)
        fits = np.isin([video.row for video in snapshot.videos], rows)
        allowed: np.ndarray = snapshot.alive & np.append(fits, False)[snapshot.row_video]
        return allowed

    def _nearest(self, vector: np.ndarray, count: int, allowed: np.ndarray) -> list[_Found]:
        count = min(count, int(np.count_nonzero(allowed)))
        if not count:
            return []
        scores, rows = self._backend.search(vector[None], count, None if allowed.all() else allowed)
        return [
            _Found(row=row, score=score, score_kind="itc")
            for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)
            if row >= 0
        ]

    def _distinct(self, vector: np.ndarray, top_k: int, allowed: np.ndarray) -> list[_Found]:
        """Return the best segment of each of the `top_k` nearest videos."""
        total = int(np.count_nonzero(allowed))
        count = min(top_k * _SEGMENTS_PER_HIT, total)
        while True:
            found = self._best_of_each_video(self._nearest(vector, count, allowed))
            if len(found) >= top_k or count >= total:
                return found[:top_k]
            count = min(count * 4, total)

    def _by_mean(self, vector: np.ndarray, allowed: np.ndarray) -> list[_Found]:
        """Return the best segment of each video with the mean over its segments, the best mean first."""
        segments = self._nearest(vector, int(np.count_nonzero(allowed)), allowed)
        owners = self.index.snapshot.row_video
        scores: dict[int, list[float]] = defaultdict(list)
        for segment in segments:
            scores[int(owners[segment.row])].append(segment.score)
        means = {video: math.fsum(values) / len(values) for video, values in scores.items()}
        best = self._best_of_each_video(segments)
        found = [
            _Found(row=segment.row, score=means[int(owners[segment.row])], score_kind="itc_mean")
            for segment in best
        ]
        return sorted(found, key=lambda segment: (-segment.score, segment.row))

    def _best_of_each_video(self, segments: Iterable[_Found]) -> list[_Found]:
        best: dict[int, _Found] = {}
        for segment in segments:
            best.setdefault(int(self.index.snapshot.row_video[segment.row]), segment)
        return list(best.values())

    def _hit(self, rank: int, segment: _Found) -> Hit:
        snapshot = self.index.snapshot
        video = snapshot.videos[int(snapshot.row_video[segment.row])]
        start_s, end_s = snapshot.row_bounds[segment.row].tolist()
        is_foreign = self.model.domain != "open" and video.domain != self.model.domain
        return Hit(
            rank=rank,
            video_id=video.video_id,
            path=os.fsdecode(video.path),
            start_s=start_s,
            end_s=end_s,
            score=segment.score,
            score_kind=segment.score_kind,
            warning=f"{self.model.name} knows only the {self.model.domain}: this hit is random"
            if is_foreign
            else None,
        )
