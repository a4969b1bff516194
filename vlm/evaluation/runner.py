"""One evaluation from start to card: encode, score, rank, control, and say what it cost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation.benchmarks.description import describe_published
from vlm.evaluation.card import FORMAT, Card, sections
from vlm.evaluation.card.inspection import inspect_scores, recall_curves
from vlm.evaluation.card.leakage import Overlap, leakage_section
from vlm.evaluation.compare import differing_fields
from vlm.evaluation.dataset import EvaluationSet, refuse_missing
from vlm.evaluation.encoders.cache import CachedTokens, FeatureCache
from vlm.evaluation.encoders.stored import StoredFeatures
from vlm.evaluation.features import (
    Floats,
    Loader,
    TextSet,
    Variant,
    VideoSet,
    encode_texts,
    encode_videos,
    first_frame,
    shuffled_frames,
    similarity,
)
from vlm.evaluation.frames_curve import curve_section, frame_variants
from vlm.evaluation.outcomes import Outcomes, embedding_outcomes, shared_positives, twin_chance
from vlm.evaluation.pairs.minimal import measure_pairs
from vlm.evaluation.protocol import Protocol
from vlm.evaluation.rerank import add_matching
from vlm.evaluation.scores.corrections import Corrections, add_corrections
from vlm.metrics import Positives, rank_scores
from vlm.text import clean
from vlm.types import VideoTextEncoder

TEST_TIME_CONTROLS: Mapping[str, Variant] = {"shuffled-frames": shuffled_frames, "first-frame": first_frame}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How to run, without influence on what is measured.

    Attributes:
        batch_size: Clips encoded at once.
        pair_batch_size: Pairs that the matching head scores at once.
        allow_missing: Leave unreadable clips out (and list them) instead of failing; a number allows so many.
        memory_bytes: What the matching head may hold of the videos' tokens at once.
        cache: Folder in which the features of videos are kept from run to run.
        test_time_controls: Also encode every clip with shuffled frames and with its first frame only.
        frames_curve: Also encode every clip with so many different frames; see ``frames_curve.RULE``.
    """

    batch_size: int = 16
    pair_batch_size: int = 64
    memory_bytes: int = 2**31
    cache: Path | None = None
    allow_missing: bool | int = False
    test_time_controls: bool = True
    frames_curve: tuple[int, ...] = ()

    def variants(self, model: VideoTextEncoder) -> dict[str, Variant]:
        """Return the altered versions of every clip that are encoded too.

        Raises:
            InvalidInput: The curve asks for more frames than the model takes, or of a file of features.
        """
        if self.frames_curve and isinstance(model, StoredFeatures):
            raise InvalidInput("--frames-curve: a file of features says nothing of fewer frames")
        controls = TEST_TIME_CONTROLS if self.test_time_controls else {}
        return {**controls, **frame_variants(self.frames_curve, model.preprocessing.num_frames)}


@dataclass(slots=True)
class _Run:
    data: EvaluationSet
    videos: VideoSet
    texts: TextSet
    outcomes: Outcomes
    scores: Floats
    load_seconds: float = 0.0
    altered: dict[str, Outcomes] = field(default_factory=dict)


def evaluate_model(
    model: VideoTextEncoder,
    data: EvaluationSet,
    protocol: Protocol,
    load: Loader,
    *,
    source: str = "",
    options: RunOptions | None = None,
    controls: Mapping[str, VideoTextEncoder | Card] | None = None,
    corrections: Corrections | None = None,
    overlap: Overlap | None = None,
) -> Card:
    """Evaluate a model on queries and clips, and make its card.

    Args:
        model: The model under test.
        data: Queries, clips and what is true of which.
        protocol: What to measure.
        load: File and preprocessing → (t, 3, s, s) float32.
        source: How the model was named by the caller, for the card.
        options: How to run.
        controls: Models trained with the same budget, or their cards by the same protocol, printed beside.
        corrections: Corrections of the embedding scores that are reported too.
        overlap: What was found of the gallery in the model's training set; without it the card says
            ``unchecked``.

    Raises:
        CapabilityError: The model cannot embed videos and texts.
        InvalidInput: Clips cannot be read and ``allow_missing`` is off, features are not finite, a control's
            card is of another protocol, every bank caption is under test, the curve asks for more frames than
            the model takes, or the overlap is that of other videos.
    """
    options = options or RunOptions()
    began = time.perf_counter()
    run = _run(model, data, protocol, load, options, options.variants(model))
    card: Card = {
        "format": FORMAT,
        "protocol": sections.protocol_section(protocol, run.data, model),
        "model": sections.model_section(model, source),
        **_measured(run, model, protocol, corrections or Corrections()),
        **_shown(run, protocol, options),
        "twins": run.outcomes.twins,
        "minimal_pairs": _minimal_pairs(model, run, protocol, options),
        "ties": run.outcomes.ties(),
        "candidates_cut_in_ties": run.outcomes.cut_ties,
        **_references(run, protocol),
        "controls": _test_time_controls(run, protocol),
        "invariance": _invariance(run),
        "data": sections.data_section(len(data.paths), run.data, model, run.texts.num_truncated),
        "leakage": leakage_section(overlap, run.data.paths, run.data.queries),
        "deviations": _deviations(model, protocol),
        "published": [describe_published(entry, protocol.num_trials) for entry in protocol.published],
        "environment": sections.environment(str(model.device), torch.get_num_threads()),
        "per_query": run.outcomes.per_query(),
    }
    for name, control in (controls or {}).items():
        card["controls"][name] = _trained_control(control, card, data, protocol, load, options)
    card["cost"] = _cost(run, time.perf_counter() - began)
    return card


def _run(
    model: VideoTextEncoder,
    data: EvaluationSet,
    protocol: Protocol,
    load: Loader,
    options: RunOptions,
    variants: Mapping[str, Variant],
) -> _Run:
    if "search" not in model.capabilities:
        raise CapabilityError(
            f"model {model.name!r} (kind {model.kind}) cannot embed videos and texts, which retrieval needs; "
            f"it can: {', '.join(sorted(model.capabilities)) or 'nothing'}"
        )
    rerank = protocol.rerank_k > 0 and "rerank" in model.capabilities
    began = time.perf_counter()
    if isinstance(model, StoredFeatures):
        variants, videos = {}, model.video_set(data.clip_ids)
    else:
        videos = encode_videos(
            model,
            data.paths,
            load,
            batch_size=options.batch_size,
            variants=variants,
            keep_tokens=rerank,
            cache=open_cache(model, protocol, options.cache),
        )
    load_seconds = time.perf_counter() - began - videos.seconds - videos.altered_seconds
    if videos.rejected:
        data, videos = _leave_out(data, videos, options)
    texts = _encode(model, data.queries, protocol)
    scores = similarity(texts.embeddings, videos.embeddings[""])
    shared = shared_positives(data.positives, _labels(data.queries))
    outcomes = embedding_outcomes(scores, data, protocol.bootstrap, shared)
    if rerank and videos.tokens is not None:
        sizes = (options.pair_batch_size, options.memory_bytes)
        add_matching(outcomes, model, data, scores, texts, videos.tokens, protocol, *sizes)
    altered = {
        name: embedding_outcomes(
            similarity(texts.embeddings, videos.embeddings[name]), data, protocol.bootstrap
        )
        for name in variants
    }
    return _Run(data, videos, texts, outcomes, scores, load_seconds, altered)


def _encode(model: VideoTextEncoder, texts: Sequence[str], protocol: Protocol) -> TextSet:
    if isinstance(model, StoredFeatures):
        return model.text_set(texts)
    return encode_texts(model, texts, max_tokens=protocol.text_tokens)


def open_cache(model: VideoTextEncoder, protocol: Protocol, folder: Path | None) -> FeatureCache | None:
    """Return the cache of a model's features under a protocol's choice of frames, None without a folder.

    Raises:
        InvalidInput: The model has no fingerprint.
    """
    if folder is None:
        return None
    return FeatureCache(folder, model, {"sampling": protocol.sampling, "trim_s": protocol.trim_s})


def _leave_out(data: EvaluationSet, videos: VideoSet, options: RunOptions) -> tuple[EvaluationSet, VideoSet]:
    rejected = videos.rejected
    unread = [(str(data.paths[clip]), reason) for clip, reason in rejected]
    refuse_missing(unread, len(data.paths), options.allow_missing)
    keep = np.setdiff1d(np.arange(len(data.paths)), [clip for clip, _ in rejected])
    videos.embeddings = {name: rows[keep] for name, rows in videos.embeddings.items()}
    if isinstance(videos.tokens, CachedTokens):
        videos.tokens = videos.tokens.keep(keep.tolist())
    elif videos.tokens is not None:
        for place, clip in enumerate(keep):  # in place: the tokens may be a file larger than memory
            videos.tokens[place] = videos.tokens[clip]
        videos.tokens = videos.tokens[: len(keep)]
    return data.without(rejected), videos


def _minimal_pairs(
    model: VideoTextEncoder, run: _Run, protocol: Protocol, options: RunOptions
) -> dict[str, Any]:
    if isinstance(model, StoredFeatures):  # has no features of texts that nobody asked for
        return {}
    sizes = {"pair_batch_size": options.pair_batch_size, "memory_bytes": options.memory_bytes}
    return measure_pairs(model, run.data, run.videos, run.texts, protocol, **sizes)


def _deviations(model: VideoTextEncoder, protocol: Protocol) -> list[str]:
    if isinstance(model, StoredFeatures):  # of which only the number of frames is known
        return protocol.frame_deviations(model.preprocessing.num_frames)
    return protocol.deviations(model.preprocessing)


def _test_time_controls(run: _Run, protocol: Protocol) -> dict[str, Any]:
    return {
        name: {
            "kind": "test-time",
            "results": outcomes.results(protocol.recall_at, protocol.bootstrap),
            "twins": outcomes.twins,
        }
        for name, outcomes in run.altered.items()
        if name in TEST_TIME_CONTROLS
    }


def _trained_control(
    control: VideoTextEncoder | Card,
    card: Card,
    data: EvaluationSet,
    protocol: Protocol,
    load: Loader,
    options: RunOptions,
) -> dict[str, Any]:
    """Return a control's section, and whether it is strong enough for the comparison to say anything."""
    if isinstance(control, dict):
        differing = differing_fields(card["protocol"], control["protocol"])
        if differing:
            fields = ", ".join(name for name, _, _ in differing)
            raise InvalidInput(f"the control's card was made by another protocol; they differ in: {fields}")
        section = {key: control.get(key, {}) for key in ("model", "results", "twins")}
    else:
        run = _run(control, data, protocol, load, options, {})
        section = {
            "model": sections.model_section(control, ""),
            "results": run.outcomes.results(protocol.recall_at, protocol.bootstrap),
            "twins": run.outcomes.twins,
        }
    return {"kind": "trained", **section, **sections.strength(section["twins"], card["twins"])}


def _invariance(run: _Run) -> dict[str, Any]:
    """Return how far outcomes move when the gallery is written in the opposite order (they must not)."""
    data = run.data
    backward = similarity(run.texts.embeddings, run.videos.embeddings[""][::-1])
    last = len(data.paths) - 1
    lists = [(last - data.positives[query]).tolist() for query in range(len(data.positives))]
    counts = rank_scores(backward, Positives.from_lists(lists, len(data.paths)))
    before = run.outcomes.ranks["query_to_item"]["itc"][0]
    moved = np.abs(counts.recall(1) - before.recall(1))
    return {"gallery_reversed": {"largest_recall@1_change": float(moved.max())}}


def _measured(
    run: _Run, model: VideoTextEncoder, protocol: Protocol, corrections: Corrections
) -> dict[str, Any]:
    """Return the card's results, with what is to know about corrected kinds and about equal captions."""
    kinds = _correct(run, model, protocol, corrections)
    recall_at, bootstrap = protocol.recall_at, protocol.bootstrap
    labels = _labels(run.data.queries)
    return {
        "results": run.outcomes.results(recall_at, bootstrap),
        "kinds": kinds,
        "duplicates": sections.duplicates(run.data.positives, labels, run.outcomes, recall_at, bootstrap),
    }


def _references(run: _Run, protocol: Protocol) -> dict[str, Any]:
    """Return the card's parts that results are held against, and those by kind of query."""
    data, recall_at, bootstrap = run.data, protocol.recall_at, protocol.bootstrap
    return {
        "tiers": sections.tiers(data, run.outcomes, bootstrap),
        "chance": sections.chance(data.positives, recall_at),
        "twin_chance": twin_chance(data) if len(data.twin_pairs) else {},
        "ceilings": sections.ceilings(data, recall_at, bootstrap),
    }


def _shown(run: _Run, protocol: Protocol, options: RunOptions) -> dict[str, Any]:
    """Return the card's parts that show rather than sum up."""
    data = run.data
    inspected = inspect_scores(
        run.outcomes, "itc", run.scores, data.positives, item_names=data.clip_ids, queries=data.queries
    )
    shown = {"recall_curve": recall_curves(run.outcomes), **inspected}
    if options.frames_curve:
        shown["frames_curve"] = curve_section(options.frames_curve, run.outcomes, run.altered, protocol)
    return shown


def _correct(
    run: _Run, model: VideoTextEncoder, protocol: Protocol, corrections: Corrections
) -> dict[str, Any]:
    bank_captions = corrections.bank_captions
    if bank_captions:
        tested = set(_labels(run.data.queries))
        captions = [
            text
            for text, label in zip(bank_captions, _labels(bank_captions), strict=True)
            if label not in tested
        ]
        if not captions:
            raise InvalidInput(
                f"all {len(bank_captions)} captions of the bank are queries under test; take those of the "
                "training or validation split"
            )
        texts = _encode(model, captions, protocol)
        source = {
            "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
            "left_out_as_queries": len(bank_captions) - len(captions),
        }
        bank = similarity(texts.embeddings, run.videos.embeddings[""])
        corrections = replace(corrections, bank=bank, bank_source=source)
    return add_corrections(run.outcomes, run.scores, run.data.positives, corrections)


def _labels(texts: Sequence[str]) -> list[str]:
    """Return what makes captions equal: the model sees their cleaned words."""
    return [clean(text) for text in texts]


def _cost(run: _Run, total_seconds: float) -> dict[str, Any]:
    num_videos, num_queries = len(run.data.paths), len(run.data.queries)
    cost = {
        "total_s": total_seconds,
        "read_videos_s": run.load_seconds,
        "videos_encoded": run.videos.num_encoded,
        "encode_videos_s": run.videos.seconds,
        "encode_altered_videos_s": run.videos.altered_seconds,
        "encode_texts_s": run.texts.seconds,
        "encode_ms_per_video": 1000 * run.videos.seconds / num_videos,
        "encode_ms_per_query": 1000 * run.texts.seconds / num_queries,
    }
    if run.outcomes.num_pairs:
        cost["matching_s"] = run.outcomes.rerank_seconds
        cost["matching_pairs"] = run.outcomes.num_pairs
        cost["matching_ms_per_pair"] = 1000 * run.outcomes.rerank_seconds / run.outcomes.num_pairs
    return {name: round(value, 4) for name, value in cost.items()}
