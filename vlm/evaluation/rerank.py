"""Candidates of the embedding search scored again by the matching head, pair by pair, each pair once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from vlm.errors import InvalidInput
from vlm.evaluation.dataset import EvaluationSet
from vlm.evaluation.encoders.cache import CachedTokens
from vlm.evaluation.features import Floats, TextSet
from vlm.evaluation.outcomes import Outcomes, twin_block, twin_grid
from vlm.evaluation.protocol import Protocol
from vlm.metrics import pair_positives, rank_candidates, top_candidates
from vlm.metrics.matrices import Ints
from vlm.progress import progress_bar
from vlm.types import VideoTextEncoder


@dataclass(frozen=True, slots=True)
class PairScores:
    """Matching logits (pairs, 2) of (text, video) pairs, by ``text * num_videos + video`` in ``keys``."""

    keys: Ints
    logits: Floats
    num_videos: int
    seconds: float

    def look_up(self, texts: Ints, videos: Ints) -> Floats:
        """Return the logits of "match" of pairs that were scored, as published; shapes broadcast.

        Raises:
            KeyError: A pair was not scored.
        """
        found: Floats = self.logits[self._places(texts, videos), 1]
        return found

    def log_odds(self, texts: Ints, videos: Ints) -> Floats:
        """Return log(p / (1 - p)) of "match", as ``look_up`` does."""
        both = self.logits[self._places(texts, videos)]
        odds: Floats = both[..., 1] - both[..., 0]
        return odds

    def _places(self, texts: Ints, videos: Ints) -> Ints:
        wanted = np.asarray(texts * self.num_videos + videos)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        if not np.array_equal(self.keys[place], wanted):
            raise KeyError("a pair was not scored")
        return place


def score_pairs(
    model: VideoTextEncoder,
    texts: TextSet,
    video_tokens: Floats | CachedTokens,
    pairs: tuple[Ints, Ints],
    *,
    batch_size: int = 64,
    memory_bytes: int = 2**31,
) -> PairScores:
    """Score (text, video) pairs with the matching head; pairs named twice are scored once.

    Videos are taken block by block, so that each one's tokens are read once however little memory there is;
    inside a block pairs are sorted by text length, so that a batch pads little. Beyond the texts' features
    the memory is one block and one batch.

    Args:
        model: A model that can ``match``.
        texts: Encoded captions.
        video_tokens: (videos, n, d), in memory or read by slices.
        pairs: Text numbers and video numbers of the same length.
        batch_size: Pairs scored at once.
        memory_bytes: What a block of video tokens may take; one video is read at least.

    Raises:
        InvalidInput: A logit is not finite.
    """
    num_videos = len(video_tokens)
    keys = np.unique(pairs[0] * num_videos + pairs[1])
    text_of, video_of = np.divmod(keys, num_videos)
    lengths = np.asarray([len(tokens) for tokens in texts.tokens])
    block = videos_in_block(video_tokens.shape, memory_bytes)
    order = np.lexsort((text_of, video_of, lengths[text_of], video_of // block))
    bounds = np.searchsorted(video_of[order] // block, np.arange(-(-num_videos // block) + 1))
    logits = np.empty((len(keys), 2), np.float32)
    began = time.perf_counter()
    with progress_bar(len(keys), "matching", "pair") as bar, torch.inference_mode():
        for number, (first, last) in enumerate(pairwise(bounds.tolist())):
            if first == last:
                continue
            held = np.array(video_tokens[number * block : (number + 1) * block])
            for start in range(first, last, batch_size):
                chosen = order[start : min(start + batch_size, last)]
                text_tokens, mask = _padded(texts, text_of[chosen])
                video = torch.from_numpy(held[video_of[chosen] - number * block])
                output = model.match(
                    video.to(model.device), text_tokens.to(model.device), mask.to(model.device)
                )
                logits[chosen] = output.float().cpu().numpy()
                bar.update(len(chosen))
    broken = np.flatnonzero(~np.isfinite(logits).all(1))
    if len(broken):
        raise InvalidInput(
            f"{len(broken)} of {len(logits)} matching scores are not finite, "
            f"the first for query {text_of[broken[0]]} and item {video_of[broken[0]]}"
        )
    return PairScores(keys, logits, num_videos, time.perf_counter() - began)


def videos_in_block(shape: tuple[int, ...], memory_bytes: int) -> int:
    """Return how many videos' tokens, (videos, n, d) float32, fit into the memory; at least one."""
    return max(1, memory_bytes // (4 * int(np.prod(shape[1:]))))


def add_matching(
    outcomes: Outcomes,
    model: VideoTextEncoder,
    data: EvaluationSet,
    scores: Floats,
    texts: TextSet,
    video_tokens: Floats | CachedTokens,
    protocol: Protocol,
    batch_size: int,
    memory_bytes: int,
) -> None:
    """Score each query's first candidates again with the matching head, both directions, and rank them.

    Kinds are ``itm@k``, the head alone, and, of a model that says its ``logit_scale``, ``itm+itc@k``: the
    head's log-odds plus the scaled cosine. Hard negatives of a text are drawn in proportion to
    ``exp(scale * cosine)``, so what the head learns is the log-ratio of the truth to that distribution, and
    the sum is the truth's.

    Source: Gutmann & Hyvärinen 2010, noise-contrastive estimation, section 2.2.
    """
    kept = np.unique(data.positives.items)
    videos_of, cuts = top_candidates(scores, protocol.rerank_k)
    texts_of, backward_cuts = top_candidates(np.ascontiguousarray(scores.T)[kept], protocol.rerank_k)
    rows = np.arange(len(data.queries), dtype=np.int64)[:, None]
    twin_texts, twin_videos = twin_grid(data)
    asked = (
        np.concatenate(
            [np.broadcast_to(rows, videos_of.shape).ravel(), texts_of.ravel(), twin_texts.ravel()]
        ),
        np.concatenate(
            [videos_of.ravel(), np.broadcast_to(kept[:, None], texts_of.shape).ravel(), twin_videos.ravel()]
        ),
    )
    pair_scores = score_pairs(
        model, texts, video_tokens, asked, batch_size=batch_size, memory_bytes=memory_bytes
    )
    outcomes.rerank_seconds, outcomes.num_pairs = pair_scores.seconds, len(pair_scores.keys)
    score_of = {f"itm@{protocol.rerank_k}": pair_scores.look_up}
    scale = model.logit_scale
    if scale is not None:

        def together(texts: Ints, videos: Ints) -> Floats:
            total: Floats = pair_scores.log_odds(texts, videos) + np.float32(scale) * scores[texts, videos]
            return total

        score_of[f"itm+itc@{protocol.rerank_k}"] = together
    for kind, pair_score in score_of.items():
        forward, backward = pair_score(rows, videos_of), pair_score(texts_of, kept[:, None])
        groups = data.groups[data.query_clip]
        outcomes.rerank("query_to_item", kind, videos_of, forward, data.positives, groups)
        outcomes.rerank("item_to_query", kind, texts_of, backward, data.positives, data.groups[kept])
        outcomes.cut_ties.setdefault("query_to_item", {})[kind] = cuts
        outcomes.cut_ties.setdefault("item_to_query", {})[kind] = backward_cuts
        if len(data.twin_pairs):
            pairs = rank_candidates(videos_of, forward, pair_positives(data.positives, data.twin_of))
            counts = outcomes.ranks["query_to_item"][kind][0]
            outcomes.twins[kind] = twin_block(data, counts, pairs, pair_score, protocol.bootstrap)


def _padded(texts: TextSet, chosen: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(texts.tokens[text]) for text in chosen)
    tokens = np.zeros((len(chosen), longest, texts.tokens[0].shape[1]), np.float32)
    mask: NDArray[np.int64] = np.zeros((len(chosen), longest), np.int64)
    for row, text in enumerate(chosen):
        tokens[row, : len(texts.tokens[text])] = texts.tokens[text]
        mask[row, : len(texts.masks[text])] = texts.masks[text]
    return torch.from_numpy(tokens), torch.from_numpy(mask)
