"""The parts of a card that describe rather than measure: protocol, model, data, chance, ceilings, machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm import __version__
from vlm.config import to_dict
from vlm.evaluation.card import as_json, measure, values_of
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.outcomes import Outcomes
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.metrics import Positives, chance_counts, rank_scores, strict_ceiling
from vlm.types import VideoTextEncoder

_STRONG_WITHIN = 0.05
# what a protocol says about the world outside; it does not change what a number means
_DESCRIPTIVE = (
    "summary",
    "task",
    "part",
    "expected",
    "files",
    "prefixes",
    "numbered",
    "known",
    "origin",
    "published",
    "input",
    "minimal_pairs",
    "freeze",
)


def protocol_section(protocol: Protocol, data: EvaluationSet, model: VideoTextEncoder) -> dict[str, Any]:
    """Return everything that two cards must share to be compared."""
    pinned = {name: value for name, value in to_dict(protocol).items() if value not in (None, "")}
    for name in (*_DESCRIPTIVE, "frames"):
        pinned.pop(name, None)
    gallery = "\n".join(sorted(data.clip_ids)).encode()
    return {
        **pinned,
        "frames": model.preprocessing.num_frames,
        "annotations_sha256": data.annotations_sha256,
        "gallery_sha256": hashlib.sha256(gallery).hexdigest(),
        "num_queries": len(data.queries),
        "num_items": len(data.clip_ids),
        "num_twin_pairs": len(data.twin_pairs),
    }


def model_section(model: VideoTextEncoder, source: str, precision: str = "") -> dict[str, Any]:
    """Return what identifies the model, how its weights were loaded, and in what precision it ran.

    Args:
        model: The model.
        source: How the caller named it.
        precision: What it ran in, where that is not what its weights say.
    """
    own = getattr(model, "precision", "unknown")  # models of load_model say both, other objects may not
    loaded = dict(getattr(model, "loaded", {}))
    return {
        "name": model.name,
        "source": source,
        "kind": model.kind,
        "domain": model.domain,
        "capabilities": sorted(model.capabilities),
        "fingerprint": model.fingerprint,
        "precision": precision or own,
        **({"weights": loaded} if loaded else {}),
        # of stored features only the number of frames is known
        "preprocessing": {"num_frames": model.preprocessing.num_frames}
        if model.kind == "features"
        else to_dict(model.preprocessing),
    }


def data_section(
    num_expected: int, data: EvaluationSet, model: VideoTextEncoder, num_truncated: int | None = None
) -> dict[str, Any]:
    """Return what was expected, what could be read, and what the model's vocabulary and length lack."""
    unknown = [words for words in map(model.unknown_words, data.queries) if words]
    return {
        "videos_expected": num_expected,
        "videos_decoded": len(data.clip_ids),
        "missing": [{"clip": clip, "reason": reason} for clip, reason in data.missing],
        "positives_per_query": float(data.positives.sizes.mean()),
        "queries_with_several_positives": int((data.positives.sizes > 1).sum()),
        "repeated_captions": len(data.queries) - len(set(data.queries)),
        "queries_truncated": num_truncated,
        "annotation_files": dict(data.annotation_files),
        "queries_with_unknown_words": len(unknown),
        "unknown_words": sorted({word for words in unknown for word in words})[:50],
    }


def chance(positives: Positives, recall_at: tuple[int, ...]) -> dict[str, Any]:
    """Return what a model without any knowledge reaches, exactly, in both directions."""
    backward, _ = positives.reversed()
    return {
        "query_to_item": values_of(chance_counts(positives), recall_at),
        "item_to_query": values_of(chance_counts(backward), recall_at),
    }


def ceilings(data: EvaluationSet, recall_at: tuple[int, ...], bootstrap: BootstrapSettings) -> dict[str, Any]:
    """Return what is reached by whoever knows only a part of the truth."""
    groups = data.groups[data.query_clip]
    return {
        name: {"query_to_item": measure(rank_scores(scores, data.positives), groups, recall_at, bootstrap)}
        for name, scores in data.oracles.items()
    }


def tiers(data: EvaluationSet, outcomes: Outcomes, bootstrap: BootstrapSettings) -> dict[str, Any]:
    """Return R@1 by tier of the queries: a mean over kinds hides what is not learned."""
    if not data.tiers:
        return {}
    names = np.asarray(data.tiers)
    groups = data.groups[data.query_clip]
    table: dict[str, Any] = {}
    for kind, (counts, _) in outcomes.ranks["query_to_item"].items():
        hits = counts.recall(1)
        for name in np.unique(names):
            inside = names == name
            interval = bootstrap.mean(hits[inside], groups[inside])
            entry = {"num_queries": int(inside.sum()), "recall@1": as_json(interval)}
            table.setdefault(str(name), {})[kind] = entry
    return table


def duplicates(
    positives: Positives,
    labels: Sequence[str],
    outcomes: Outcomes,
    recall_at: tuple[int, ...],
    bootstrap: BootstrapSettings,
) -> dict[str, Any]:
    """Return how many queries share their words with a query for other items, and the results if they count.

    ``results`` of the card are by the positives as given; here what is right for one of two equal queries is
    right for both.
    """
    if outcomes.shared is None:
        return {"texts": 0, "queries": 0}
    affected = np.flatnonzero(outcomes.shared.sizes > positives.sizes)
    return {
        "texts": len({labels[query] for query in affected.tolist()}),
        "queries": len(affected),
        "strict_ceiling": {"recall@1": {"value": strict_ceiling(positives, labels)}},
        "results": outcomes.shared_results(recall_at, bootstrap),
    }


def strength(control_twins: Mapping[str, Any], model_twins: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether a control finds the right pair about as often as the model does.

    A control that lacks order must fail on direction only; one that also misses the pair is merely weak, and
    beating it proves nothing.
    """
    if "itc" not in control_twins or "itc" not in model_twins:
        return {}
    behind = model_twins["itc"]["pair_recall@1"]["value"] - control_twins["itc"]["pair_recall@1"]["value"]
    if behind <= _STRONG_WITHIN:
        return {"strong": True}
    verdict = f"comparison void: {100 * behind:.1f} points behind in pair R@1, more than 5"
    return {"strong": False, "verdict": verdict}


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return the software and device that the card was made with."""
    return {
        "vlm": __version__,
        "torch": importlib.metadata.version("torch"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "threads": threads,
    }
