"""Moments that a model found, or that stand in a file, measured; one card."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.config import to_dict
from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.card import FORMAT, Card, sections
from vlm.evaluation.card.leakage import Overlap, leakage_section
from vlm.evaluation.dataset import refuse_missing
from vlm.evaluation.features import count_cut, encode_texts, similarity
from vlm.evaluation.moments.baselines import blind_highlights, blind_moments
from vlm.evaluation.moments.data import MomentSet
from vlm.evaluation.moments.measures import (
    by_length,
    fit_saliency,
    measure_highlights,
    measure_windows,
    rated_queries,
    with_intervals,
)
from vlm.evaluation.moments.predictions import FoundMoments
from vlm.evaluation.moments.proposals import propose, rate_clips
from vlm.evaluation.moments.settings import Proposals
from vlm.evaluation.protocol import Protocol
from vlm.metrics.matrices import Floats
from vlm.progress import progress_bar
from vlm.types import Preprocessing, VideoTextEncoder

StretchLoader = Callable[[Path, Preprocessing, Proposals], Iterator[tuple[tuple[float, float], Tensor]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """What a model found, in which videos, and how long it took."""

    found: FoundMoments
    data: MomentSet
    missing: tuple[tuple[str, str], ...]
    num_stretches: int
    seconds: float


def find_moments(
    model: VideoTextEncoder,
    data: MomentSet,
    protocol: Protocol,
    load: StretchLoader,
    *,
    batch_size: int = 16,
    allow_missing: bool | int = False,
) -> Search:
    """Score every stretch of every video against the queries about it, and keep the best.

    Args:
        model: A model that embeds videos and texts.
        data: The queries.
        protocol: How stretches are cut and kept.
        load: File, preprocessing and proposals → each stretch (start, end) in seconds with its frames
            (t, 3, s, s) float32; raises DataError.
        batch_size: Stretches encoded at once.
        allow_missing: Leave queries about unreadable videos out (and list these); a number allows so many.

    Raises:
        CapabilityError: The model has no embedding that video and text share.
        InvalidInput: Videos cannot be read and are not allowed to be missing, or an embedding is not finite.
    """
    _require_search(model)
    assert protocol.moments is not None
    began = time.perf_counter()
    texts = encode_texts(model, data.queries, max_tokens=protocol.text_tokens).embeddings
    rows: list[tuple[Floats, Floats | None] | None] = [None] * len(data.queries)
    lost: dict[int, str] = {}
    durations: list[float | None] = []
    num_stretches = 0
    with progress_bar(len(data.paths), "videos", "video") as bar:
        for video, path in enumerate(data.paths):
            bar.update()
            durations.append(None)
            try:
                stretches, vectors = _encode(model, path, load, protocol.moments.proposals, batch_size)
            except DataError as error:
                lost[video] = f"{error.reason}: {error}"
                continue
            durations[-1] = float(stretches[:, 1].max())
            num_stretches += len(stretches)
            asked = np.flatnonzero(data.query_video == video)
            for query, scores in zip(asked.tolist(), similarity(texts[asked], vectors), strict=True):
                rows[query] = _find(stretches, scores, data.ratings[query], protocol)
    missing = tuple((data.video_ids[video], reason) for video, reason in lost.items())
    refuse_missing(missing, len(data.paths), allow_missing, "videos")
    found = [row for row in rows if row is not None]
    return Search(
        found=FoundMoments(
            windows=tuple(windows for windows, _ in found), saliency=tuple(scores for _, scores in found)
        ),
        # the length of the file that was seen, which is what a guess would see
        data=replace(data, durations_s=tuple(durations)).without_videos(set(lost)),
        missing=missing,
        num_stretches=num_stretches,
        seconds=time.perf_counter() - began,
    )


def evaluate_search(
    search: Search,
    model: VideoTextEncoder,
    protocol: Protocol,
    source: str = "",
    overlap: Overlap | None = None,
) -> Card:
    """Return the card of what a model found; the score that orders its moments is ``itc``.

    Args:
        search: What was found.
        model: The model that found it.
        protocol: Which measures.
        source: How the model was named by the caller.
        overlap: What was found of the videos in the model's training set.

    Raises:
        InvalidInput: The overlap is that of other videos.
    """
    assert protocol.moments is not None
    seen = {
        "proposals": to_dict(protocol.moments.proposals),
        "sampling": protocol.sampling,
        "frames": model.preprocessing.num_frames,
        "text_tokens": protocol.text_tokens,
    }
    card = _card("itc", search.found, search.data, protocol, seen)
    card["model"] = sections.model_section(model, source)
    card["data"] |= {
        "videos_expected": len(search.data.video_ids) + len(search.missing),
        "videos_decoded": len(search.data.video_ids),
        "missing": [{"clip": name, "reason": reason} for name, reason in search.missing],
        "queries_truncated": count_cut(model, search.data.queries, protocol.text_tokens),
    }
    card["leakage"] = leakage_section(overlap, search.data.paths, search.data.queries)
    card["deviations"] = protocol.deviations(model.preprocessing)
    card["environment"] = sections.environment(str(model.device), torch.get_num_threads())
    card["cost"] = {
        "total_s": round(search.seconds, 4),
        "stretches_encoded": search.num_stretches,
        "ms_per_stretch": round(1000 * search.seconds / max(1, search.num_stretches), 4),
    }
    return card


def evaluate_found(found: FoundMoments, data: MomentSet, protocol: Protocol, model: dict[str, Any]) -> Card:
    """Return the card of moments from a file; what ordered them is not known, so the score is ``given``.

    Args:
        found: What was found.
        data: The queries.
        protocol: Which measures.
        model: What is known of the model.
    """
    card = _card("given", found, data, protocol, {})
    card["model"] = model
    card["environment"] = sections.environment("cpu", 1)
    return card


def _card(kind: str, found: FoundMoments, data: MomentSet, protocol: Protocol, seen: dict[str, Any]) -> Card:
    if not data.queries:
        raise InvalidInput("no query can be asked, as no video can be read")
    values = measure_windows(found.windows, data, protocol)
    groups, bootstrap = data.query_video, protocol.bootstrap
    card: Card = {
        "format": FORMAT,
        "protocol": _protocol_section(protocol, data, seen),
        "model": {},
        "results": {"moments": {kind: with_intervals(values, groups, bootstrap)}},
        "lengths": {kind: by_length(found.windows, data, protocol)},
        "baselines": {
            "moments": blind_moments(data, protocol),
            "highlights": blind_highlights(data, protocol),
        },
        "ties": {"moments": {kind: found.num_tied}},
        "data": {
            "annotation_files": dict(data.annotation_files),
            "queries_nothing_was_found_for": sum(not len(rows) for rows in found.windows),
            "queries_with_empty_windows_only": data.num_unreachable,
        },
        "leakage": leakage_section(None, ()),
        "published": [describe_published(entry, protocol.num_trials) for entry in protocol.published],
        "per_query": {"moments": {kind: _outcomes(values, groups.tolist())}},
    }
    rated = rated_queries(data)
    if rated and any(scores is not None for scores in found.saliency):
        highlights = measure_highlights(fit_saliency(found.saliency, data), data)
        owners = groups[rated]
        card["results"]["highlights"] = {
            kind: {name: with_intervals(block, owners, bootstrap) for name, block in highlights.items()}
        }
        named = {
            f"{name} {key}": column for name, block in highlights.items() for key, column in block.items()
        }
        card["per_query"]["highlights"] = {kind: _outcomes(named, owners.tolist())}
    return card


def _outcomes(values: dict[str, Floats], groups: list[int]) -> dict[str, Any]:
    return {"values": {name: column.tolist() for name, column in values.items()}, "groups": groups}


def _protocol_section(protocol: Protocol, data: MomentSet, seen: dict[str, Any]) -> dict[str, Any]:
    measures = to_dict(protocol.moments)
    del measures["proposals"]
    videos = "\n".join(data.video_ids).encode()
    return {
        "name": protocol.name,
        "version": protocol.version,
        "task": protocol.task,
        "split": protocol.split,
        "recall_at": list(protocol.recall_at),
        **measures,
        "bootstrap": to_dict(protocol.bootstrap),
        **seen,
        "annotations_sha256": data.annotations_sha256,
        "gallery_sha256": hashlib.sha256(videos).hexdigest(),
        "num_queries": len(data.queries),
        "num_items": len(data.video_ids),
    }


def _require_search(model: VideoTextEncoder) -> None:
    if "search" not in model.capabilities:
        raise CapabilityError(
            f"model {model.name!r} (kind {model.kind}) cannot embed videos and texts, which finding moments "
            f"needs; it can: {', '.join(sorted(model.capabilities)) or 'nothing'}"
        )


def _encode(
    model: VideoTextEncoder, path: Path, load: StretchLoader, proposals: Proposals, batch_size: int
) -> tuple[Floats, Floats]:
    """Return the stretches of a video, (n, 2), and their embeddings, (n, e)."""
    stretches: list[tuple[float, float]] = []
    waiting: list[Tensor] = []
    vectors: list[Floats] = []

    def encode() -> None:
        with torch.inference_mode():
            features = model.encode_video(torch.stack(waiting).to(model.device))
        vectors.append(features.embedding.float().cpu().numpy())
        waiting.clear()

    for stretch, clip in load(path, model.preprocessing, proposals):
        stretches.append(stretch)
        waiting.append(clip)
        if len(waiting) == batch_size:
            encode()
    if waiting:
        encode()
    embeddings = np.concatenate(vectors)
    wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(wrong):
        start, end = stretches[int(wrong[0])]
        raise InvalidInput(
            f"{path}: the model's embedding of {start:g} to {end:g} s is not finite; check its weights"
        )
    return np.asarray(stretches, np.float64), embeddings


def _find(
    stretches: Floats, scores: Floats, ratings: Floats | None, protocol: Protocol
) -> tuple[Floats, Floats | None]:
    settings = protocol.moments
    assert settings is not None
    windows = propose(stretches, scores, settings.max_windows, settings.proposals.suppress_iou)
    if ratings is None:
        return windows, None
    return windows, rate_clips(stretches, scores, len(ratings), settings.clip_s)
