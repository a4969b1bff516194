"""Minimal pairs: a clip, its caption, and the caption of a scene that differs in one thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm import world
from vlm.evaluation.card import as_json
from vlm.evaluation.dataset import EvaluationSet, Foil
from vlm.evaluation.features import Floats, TextSet, VideoSet, encode_texts
from vlm.evaluation.protocol import BootstrapSettings, Protocol
from vlm.evaluation.rerank import score_pairs
from vlm.types import VideoTextEncoder
from vlm.world.splits import digest

_KEY = 0x9A125  # of the draw of what is changed


def world_foils(scenes: Sequence[world.Scene]) -> tuple[Foil, ...]:
    """Return the captions of scenes that differ in one thing from each scene; the same on every machine.

    Query and clip of a foil are the scene's place in the sequence. Captions that read alike are left out.
    """
    found = []
    for place, scene in enumerate(scenes):
        rng = np.random.default_rng([_KEY, digest(scene.clip_id, 2**63)])
        right = world.caption(scene)
        for kind, other in world.variants(scene, rng).items():
            text = world.caption(other)
            if text != right:
                found.append(Foil(query=place, kind=kind, text=text))
    return tuple(found)


def measure_pairs(
    model: VideoTextEncoder,
    data: EvaluationSet,
    videos: VideoSet,
    texts: TextSet,
    protocol: Protocol,
    *,
    pair_batch_size: int = 64,
    memory_bytes: int = 2**31,
) -> dict[str, Any]:
    """Return how often a clip scores higher with its caption than with its foil; equal scores count half.

    Args:
        model: The model under test.
        data: With foils.
        videos: Its clips, encoded; with tokens the matching head is asked too.
        texts: Its queries, encoded.
        protocol: Where texts are cut, and how intervals are drawn.
        pair_batch_size: Pairs that the matching head scores at once.
        memory_bytes: What it may hold of the videos' tokens at once.

    Returns:
        Kind of score → kind of pair, and ``all`` → ``{"accuracy": {"value", "low", "high"}, "num_pairs"}``;
        guessing is right in half of the pairs.
    """
    if not data.foils:
        return {}
    words = list(dict.fromkeys(foil.text for foil in data.foils))
    row_of = {text: row for row, text in enumerate(words)}
    foil_set = encode_texts(model, words, max_tokens=protocol.text_tokens)
    queries = np.asarray([foil.query for foil in data.foils], np.int64)
    foils = np.asarray([row_of[foil.text] for foil in data.foils], np.int64)
    clips = data.query_clip[queries]
    embedded = videos.embeddings[""][clips].astype(np.float64)
    pairs = {
        "itc": (
            np.einsum("pe,pe->p", texts.embeddings[queries], embedded),
            np.einsum("pe,pe->p", foil_set.embeddings[foils], embedded),
        )
    }
    if videos.tokens is not None:
        settings: dict[str, int] = {"batch_size": pair_batch_size, "memory_bytes": memory_bytes}
        right = score_pairs(model, texts, videos.tokens, (queries, clips), **settings)
        wrong = score_pairs(model, foil_set, videos.tokens, (foils, clips), **settings)
        pairs["itm"] = (right.look_up(queries, clips), wrong.look_up(foils, clips))
    kinds = np.asarray([foil.kind for foil in data.foils])
    groups = data.groups[clips]
    return {
        name: _table(right.astype(np.float32), wrong.astype(np.float32), kinds, groups, protocol.bootstrap)
        for name, (right, wrong) in pairs.items()
    }


def _table(
    right: Floats, wrong: Floats, kinds: NDArray[Any], groups: NDArray[Any], bootstrap: BootstrapSettings
) -> dict[str, Any]:
    hits = np.where(right == wrong, 0.5, right > wrong)
    table = {}
    for name in ("all", *sorted(set(kinds.tolist()))):
        inside = np.ones(len(kinds), bool) if name == "all" else kinds == name
        table[name] = {
            "accuracy": as_json(bootstrap.mean(hits[inside], groups[inside])),
            "num_pairs": int(inside.sum()),
        }
    return table
