"""Clips and captions into features by any model, in batches, with memory bounded."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm.errors import DataError, InvalidInput
from vlm.models import VideoTextModel
from vlm.progress import progress_bar
from vlm.text.tokenizer import TruncationWarning
from vlm.types import Preprocessing, TokenBatch, VideoTextEncoder

Floats = NDArray[np.float32]
Loader = Callable[[Path, Preprocessing], Tensor]
Variant = Callable[[Tensor, int], Tensor]
_IN_MEMORY_BYTES = 2**30
_ENDLESS = 10**6


@dataclass(slots=True)
class VideoSet:
    """Encoded clips: ``embeddings`` (clips, e) by variant; ``tokens`` (clips, n, d) of the unaltered one."""

    embeddings: dict[str, Floats]
    tokens: Floats | None
    seconds: float
    rejected: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True)
class TextSet:
    """Encoded captions: ``embeddings`` (texts, e); ``tokens`` (l, d) of each, without trailing padding.

    ``num_truncated`` counts those that were cut; None where the model does not say how it cuts.
    """

    embeddings: Floats
    tokens: list[Floats]
    masks: list[NDArray[np.int64]]
    seconds: float
    num_truncated: int | None = None


def encode_videos(
    model: VideoTextEncoder,
    paths: Sequence[Path],
    load: Loader,
    *,
    batch_size: int = 16,
    variants: Mapping[str, Variant] | None = None,
    keep_tokens: bool = False,
) -> VideoSet:
    """Encode every clip, and altered versions of it in the same pass over the files.

    A clip that cannot be read is reported in ``rejected`` with its reason, and its rows stay zero.

    Args:
        model: Anything with the interface of ``VideoTextEncoder``.
        paths: The clips' files.
        load: File and preprocessing → (t, 3, s, s) float32; raises DataError.
        batch_size: Clips encoded at once.
        variants: Name → function of (clip, clip's number); the clip as it is comes first, named ``""``.
        keep_tokens: Keep the token features too, for the matching head: in memory up to 1 GiB, else in a
            temporary file that vanishes with the process.

    Raises:
        InvalidInput: The model's output is not finite.
    """
    every = {"": _unchanged, **(variants or {})}
    result = VideoSet({}, None, 0.0)
    with progress_bar(len(paths), "videos", "video") as bar:
        for start in range(0, len(paths), batch_size):
            clips: list[tuple[int, Tensor]] = []
            for number in range(start, min(start + batch_size, len(paths))):
                try:
                    clips.append((number, load(paths[number], model.preprocessing)))
                except DataError as error:
                    result.rejected.append((number, f"{error.reason}: {error}"))
                bar.update()
            if clips:
                _encode_batch(model, clips, every, result, len(paths), keep_tokens)
    return result


def encode_texts(
    model: VideoTextEncoder, texts: Sequence[str], *, batch_size: int = 64, max_tokens: int | None = None
) -> TextSet:
    """Encode captions.

    Args:
        model: Anything with the interface of ``VideoTextEncoder``.
        texts: At least one.
        batch_size: Captions encoded at once.
        max_tokens: Where a model with BERT's tokenizer cuts them; its own limit by default.

    Raises:
        InvalidInput: The model's output is not finite.
    """
    embeddings, tokens, masks = [], [], []
    num_truncated: int | None = None
    began = time.perf_counter()
    with progress_bar(len(texts), "captions", "caption") as bar, torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch, num_cut = _cut(model, list(texts[start : start + batch_size]), max_tokens)
            num_truncated = num_cut if num_truncated is None or num_cut is None else num_truncated + num_cut
            features = model.encode_text(batch)
            embeddings.append(_array(features.embedding, "caption", range(start, len(texts))))
            for row, mask in zip(_array(features.tokens), features.mask.cpu().numpy(), strict=True):
                length = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 1
                tokens.append(row[:length].copy())
                masks.append(mask[:length].astype(np.int64))
            bar.update(len(embeddings[-1]))
    seconds = time.perf_counter() - began
    return TextSet(np.concatenate(embeddings), tokens, masks, seconds, num_truncated)


def _cut(
    model: VideoTextEncoder, texts: list[str], max_tokens: int | None
) -> tuple[list[str] | TokenBatch, int | None]:
    """Return texts as tokens where the model has a tokenizer, and how many of them were cut."""
    if not isinstance(model, VideoTextModel):
        return texts, None
    limit = min(max_tokens or model.config.text.max_positions, model.config.text.max_positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # counted instead, and in the card
        lengths = model.tokenizer(texts, max_tokens=_ENDLESS).attention_mask.sum(dim=1)
        return model.tokenize(texts, limit), int((lengths > limit).sum())


def similarity(texts: Floats, videos: Floats) -> Floats:
    """Return inner products (texts, videos), summed in fp64 and rounded to fp32.

    A matrix product in fp32 depends on where in the matrix an entry stands, so that equal videos would get
    unequal scores and the gallery's order would decide ranks.
    """
    scores = np.empty((len(texts), len(videos)), np.float32)
    wide = videos.astype(np.float64).T
    for start in range(0, len(texts), 1024):
        scores[start : start + 1024] = texts[start : start + 1024].astype(np.float64) @ wide
    return scores


def shuffled_frames(clip: Tensor, number: int) -> Tensor:
    """Return the clip with its frames in an order drawn from its number, the same in every run."""
    random = np.random.default_rng([0xF4A3E5, number])
    return clip[torch.from_numpy(random.permutation(len(clip)))]


def first_frame(clip: Tensor, _number: int) -> Tensor:
    """Return the clip's first frame, repeated to the clip's length: no motion, same input shape."""
    return clip[:1].expand_as(clip)


def _unchanged(clip: Tensor, _number: int) -> Tensor:
    return clip


def _encode_batch(
    model: VideoTextEncoder,
    clips: list[tuple[int, Tensor]],
    variants: Mapping[str, Variant],
    result: VideoSet,
    num_clips: int,
    keep_tokens: bool,
) -> None:
    numbers = [number for number, _ in clips]
    for name, alter in variants.items():
        video = torch.stack([alter(clip, number) for number, clip in clips])
        began = time.perf_counter()
        with torch.inference_mode():
            features = model.encode_video(video.to(model.device))
            embedding = _array(features.embedding, "clip", numbers)
        if name not in result.embeddings:
            result.embeddings[name] = np.zeros((num_clips, embedding.shape[1]), np.float32)
        result.embeddings[name][numbers] = embedding
        if name == "":
            result.seconds += time.perf_counter() - began
            if keep_tokens:
                tokens = _array(features.tokens)
                if result.tokens is None:
                    result.tokens = _token_store((num_clips, *tokens.shape[1:]))
                result.tokens[numbers] = tokens


def _token_store(shape: tuple[int, ...]) -> Floats:
    num_bytes = 4 * int(np.prod(shape))
    if num_bytes <= _IN_MEMORY_BYTES:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(prefix="vlm-tokens-") as file:
        # reserved now: a full disk is an error here, and a bus error when a mapped page is written
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return np.memmap(file, np.float32, "r+", shape=shape)


def _array(tensor: Tensor, what: str = "", numbers: Sequence[int] = ()) -> Floats:
    array = tensor.detach().float().cpu().numpy()
    if what and not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(axis=1))[0])
        raise InvalidInput(
            f"the model's embedding of {what} {numbers[row]} is not finite; "
            "check its weights and try --dtype float32"
        )
    return np.asarray(array)
