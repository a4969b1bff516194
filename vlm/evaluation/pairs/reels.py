"""Reels of the digit world: who was there and who came first, by pairs of claims of which one is true."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from vlm.data.preprocessing import preprocess
from vlm.errors import CapabilityError
from vlm.evaluation.card import FORMAT, Card, as_json, sections
from vlm.evaluation.protocol import BootstrapSettings
from vlm.models import VideoTextModel
from vlm.progress import progress_bar
from vlm.types import Preprocessing, VideoTextEncoder
from vlm.world.chapters.claims import KINDS, AskedReel, asked_groups, ceiling
from vlm.world.chapters.reels import render_reel

_AT_ONCE = 16

_PROTOCOL = {"name": "reels", "version": 1, "task": "claims", "sampling": "middle"}
_PAIRS = 8  # of each kind about each reel


def score_of(model: VideoTextEncoder) -> str:
    """Return which score judges claims: ``itm`` of a model with a matching head, else ``itc``.

    Raises:
        CapabilityError: The model has neither.
    """
    for capability, score in (("rerank", "itm"), ("search", "itc")):
        if capability in model.capabilities:
            return score
    raise CapabilityError(
        f"model {model.name!r} (kind {model.kind}) can neither match nor search, one of which claims "
        f"about reels need; it can: {', '.join(sorted(model.capabilities)) or 'nothing'}"
    )


@torch.inference_mode()
def judge(model: VideoTextEncoder, asked: Sequence[AskedReel], *, report: bool = True) -> NDArray[np.float64]:
    """Return which claims a model tells apart, (reels, pairs): 1 the true one scores higher, 0, or 0.5.

    Args:
        model: In evaluation mode; decides how many frames are sampled.
        asked: Reels with equally many claims.
        report: Show progress.
    """
    hits = []
    with progress_bar(len(asked), "reels", "reel") if report else nullcontext() as bar:
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            clips = torch.stack([_clip(item, model.preprocessing) for item in part])
            videos = model.encode_video(clips.to(model.device))
            texts = model.encode_text([text for item in part for pair in item.pairs for text in pair.texts])
            count = len(texts.mask) // len(part)
            if score_of(model) == "itm":
                tokens = videos.tokens.repeat_interleave(count, dim=0)
                logits = model.match(tokens, texts.tokens, texts.mask)
                scores = logits[:, 1] - logits[:, 0]
            else:
                scores = (texts.embedding * videos.embedding.repeat_interleave(count, dim=0)).sum(dim=1)
            right, wrong = rearrange(scores.double().cpu(), "(b p two) -> two b p", b=len(part), two=2)
            hits.append(((right > wrong).double() + 0.5 * (right == wrong).double()).numpy())
            if bar is not None:
                bar.update(len(part))
    return np.concatenate(hits)


def _clip(item: AskedReel, preprocessing: Preprocessing) -> torch.Tensor:
    return preprocess(render_reel(item.reel, preprocessing.num_frames), preprocessing)


def measure_reels(model: VideoTextEncoder, split: str, seed: int, count: int, *, source: str = "") -> Card:
    """Return the card of a model on groups of four reels: accuracy for presence and for order.

    Args:
        model: That can match, or embed videos and texts.
        split: ``val`` or ``test``.
        seed: Of the stream of reels.
        count: Groups; the interval resamples these.
        source: How the model was named by the caller, for the card.

    Returns:
        With ``reels``: kind of claim → accuracy, chance and what an oracle would reach that sees the same
        frames, without their order if the model encodes each by itself; and the outcome of each pair.

    Raises:
        CapabilityError: The model can neither match nor search.
    """
    bootstrap, score = BootstrapSettings(), score_of(model)
    began = time.perf_counter()
    grouped = asked_groups(split, seed, count, _PAIRS)
    asked = [item for group in grouped for item in group]
    hits = judge(model, asked)
    frames = model.preprocessing.num_frames
    kinds = np.array([[pair.kind for pair in item.pairs] for item in asked])
    groups = np.broadcast_to(np.repeat(np.arange(count), len(grouped[0]))[:, None], hits.shape)
    is_bag = isinstance(model, VideoTextModel) and model.config.vision.independent_frames
    best = np.stack([ceiling(item, frames, ordered=not is_bag) for item in asked])
    table, outcomes = {}, {}
    for kind in KINDS:
        inside = kinds == kind
        table[kind] = {
            "accuracy": as_json(bootstrap.mean(hits[inside], groups[inside])),
            "chance": {"value": 0.5},
            "ceiling": {"value": float(best[inside].mean())},
            "num_pairs": int(inside.sum()),
        }
        outcomes[kind] = {score: {"right": hits[inside].tolist(), "groups": groups[inside].tolist()}}
    return {
        "format": FORMAT,
        "protocol": {
            **_PROTOCOL,
            "split": split,
            "seed": seed,
            "num_groups": count,
            "num_reels": len(asked),
            "bootstrap": {"resamples": bootstrap.resamples, "seed": bootstrap.seed},
            "claims_sha256": _hash_of(asked),
        },
        "model": sections.model_section(model, source),
        "results": {kind: {score: {"accuracy": row["accuracy"]}} for kind, row in table.items()},
        "score": score,
        "is_bag_of_frames": is_bag,
        "reels": table,
        "environment": sections.environment(str(model.device), torch.get_num_threads()),
        "per_query": outcomes,
        "cost": {"total_seconds": round(time.perf_counter() - began, 1)},
    }


def _hash_of(asked: Sequence[AskedReel]) -> str:
    lines = [f"{item.reel.reel_id} {text}" for item in asked for pair in item.pairs for text in pair.texts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def table(card: Mapping[str, Any]) -> str:
    """Return a card of reels as a Markdown table, percent."""
    lines = [
        "| claims | accuracy | 95 % interval | chance | best of these frames | pairs |",
        "| --- " * 6 + "|",
    ]
    for kind, row in card["reels"].items():
        accuracy = row["accuracy"]
        shown = (accuracy["value"], accuracy["low"], accuracy["high"], row["chance"]["value"])
        value, low, high, chance = (100 * number for number in shown)
        best, pairs = 100 * row["ceiling"]["value"], row["num_pairs"]
        lines.append(
            f"| {kind} | {value:.1f} | [{low:.1f}, {high:.1f}] | {chance:.1f} | {best:.1f} | {pairs} |"
        )
    return "\n".join(lines)
