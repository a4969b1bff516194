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

from vlm.data.frame_sampling import middle_frames
from vlm.errors import DataError, InvalidInput
from vlm.evaluation.encoders.cache import TOKENS, CachedTokens, FeatureCache
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
    """Encoded clips: ``embeddings`` (clips, e) by variant; ``tokens`` (clips, n, d) of the unaltered one.

    ``num_encoded`` counts the clips that were encoded now, the others came from a cache. ``seconds`` is the
    time of encoding the unaltered clips, ``altered_seconds`` that of their altered versions.
    """

    embeddings: dict[str, Floats]
    tokens: Floats | CachedTokens | None
    seconds: float
    rejected: list[tuple[int, str]] = field(default_factory=list)
    num_encoded: int = 0
    altered_seconds: float = 0.0


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
    cache: FeatureCache | None = None,
    only: Sequence[int] | None = None,
) -> VideoSet:
    """Encode every clip, and altered versions of it in the same pass over the files.

    A clip that cannot be read is reported in ``rejected`` with its reason, and its rows stay zero.

    Args:
        model: Anything with the interface of ``VideoTextEncoder``.
        paths: The clips' files.
        load: File and preprocessing → (t, 3, s, s) float32; raises DataError.
        batch_size: Clips encoded at once.
        variants: Name → function of (clip, clip's number); the clip as it is comes first, named ``""``.
        keep_tokens: Keep the token features too, for the matching head: in the cache if there is one, else in
            memory up to 1 GiB, else in a temporary file that vanishes with the process.
        cache: Where features are looked for and kept, video by video.
        only: Numbers of the clips to encode; None means all. The rows of the others stay zero.

    Raises:
        InvalidInput: The model's output is not finite.
        NoSpaceError: There is no room for the cache; what it holds stays.
    """
    every = {"": _unchanged, **(variants or {})}
    work = _Encoding(model, every, len(paths), keep_tokens, cache)
    numbers = range(len(paths)) if only is None else only
    with progress_bar(len(numbers), "videos", "video") as bar:
        for number in numbers:
            try:
                work.add(number, paths[number], load)
            except DataError as error:
                work.result.rejected.append((number, f"{error.reason}: {error}"))
            if len(work.waiting) == batch_size:
                work.encode()
            bar.update()
        work.encode()
    return work.finish()


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
        return texts, count_cut(model, texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # counted instead, and in the card
        return model.tokenize(texts, max_tokens), count_cut(model, texts, max_tokens)


def count_cut(model: VideoTextEncoder, texts: Sequence[str], max_tokens: int | None = None) -> int | None:
    """Return how many texts are longer than the model reads; None where it does not say how it cuts."""
    if not isinstance(model, VideoTextModel):
        say = getattr(model, "count_cut", None)
        counted: int | None = say(texts) if callable(say) else None
        return counted
    limit = min(max_tokens or model.config.text.max_positions, model.config.text.max_positions)
    lengths = model.tokenizer(list(texts), max_tokens=_ENDLESS).attention_mask.sum(dim=1)
    return int((lengths > limit).sum())


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


def few_frames(num_frames: int) -> Variant:
    """Return an alteration that lets a clip show only so many different frames, at its full length.

    The clip's T frames are cut into ``num_frames`` equal spans, as ``middle_frames`` cuts a video, and every
    frame of a span is replaced by the span's middle one. With ``num_frames`` = T nothing changes.

    Raises:
        ValueError: There are fewer frames in the clip, when it is applied, or ``num_frames`` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"expected at least 1 frame, got {num_frames}")

    def alter(clip: Tensor, _number: int) -> Tensor:
        if num_frames > len(clip):
            raise ValueError(f"expected at most {len(clip)} frames, which the clip has, got {num_frames}")
        bounds = np.linspace(0, len(clip), num_frames + 1).astype(np.int64)
        chosen = np.repeat(middle_frames(len(clip), num_frames), np.diff(bounds))
        return clip[torch.from_numpy(chosen)]

    return alter


def _unchanged(clip: Tensor, _number: int) -> Tensor:
    return clip


class _Encoding:
    """Clips that wait for their batch, and where the features go."""

    def __init__(
        self,
        model: VideoTextEncoder,
        variants: Mapping[str, Variant],
        num_clips: int,
        keep_tokens: bool,
        cache: FeatureCache | None,
    ) -> None:
        self._model, self._variants, self._num_clips = model, variants, num_clips
        self._keep_tokens, self._cache = keep_tokens, cache
        self._digests: dict[int, str] = {}
        self.waiting: list[tuple[int, Tensor]] = []
        self.result = VideoSet({}, None, 0.0)

    def add(self, number: int, path: Path, load: Loader) -> None:
        """Take a clip's features from the cache, or let it wait to be encoded."""
        if self._cache is not None:
            if not path.is_file():
                raise DataError(f"{path}: no such file", "missing")
            digest = self._cache.digest(path)
            if digest in (self._digests[other] for other, _ in self.waiting):
                self.encode()  # the same video under another name: its features come from the cache then
            self._digests[number] = digest
            names = {name: _cached_name(name, number) for name in self._variants}
            found = self._cache.read(digest, [*names.values(), *([TOKENS] if self._keep_tokens else [])])
            if found is not None:
                for name, key in names.items():
                    self._store(name, [number], found[key][None])
                return
        self.waiting.append((number, load(path, self._model.preprocessing)))

    def encode(self) -> None:
        """Encode the clips that wait, in every variant, and write them to the cache."""
        numbers = [number for number, _ in self.waiting]
        kept: list[dict[str, Floats]] = [{} for _ in numbers]
        for name, alter in self._variants.items() if numbers else ():
            video = torch.stack([alter(clip, number) for number, clip in self.waiting])
            began = time.perf_counter()
            with torch.inference_mode():
                features = self._model.encode_video(video.to(self._model.device))
                embedding = _array(features.embedding, "clip", numbers)
            self._store(name, numbers, embedding)
            for entry, number, row in zip(kept, numbers, embedding, strict=True):
                entry[_cached_name(name, number)] = row
            seconds = time.perf_counter() - began
            if name:
                self.result.altered_seconds += seconds
                continue
            self.result.seconds += seconds
            if self._keep_tokens:
                self._keep(numbers, _array(features.tokens), kept)
        if self._cache is not None:
            for number, entry in zip(numbers, kept, strict=True):
                self._cache.write(self._digests[number], entry)
        self.result.num_encoded += len(numbers)
        self.waiting = []

    def finish(self) -> VideoSet:
        """Return what was encoded and what was found."""
        if self._cache is not None and self._keep_tokens:
            for number, _ in self.result.rejected:
                self._digests.pop(number, None)
            if self._digests:
                digests = [self._digests.get(number) for number in range(self._num_clips)]
                self.result.tokens = CachedTokens(self._cache, digests)
        return self.result

    def _store(self, name: str, numbers: list[int], embedding: Floats) -> None:
        rows = self.result.embeddings
        if name not in rows:
            rows[name] = np.zeros((self._num_clips, embedding.shape[1]), np.float32)
        rows[name][numbers] = embedding

    def _keep(self, numbers: list[int], tokens: Floats, kept: list[dict[str, Floats]]) -> None:
        if self._cache is not None:
            for entry, row in zip(kept, tokens, strict=True):
                entry[TOKENS] = row
            return
        if self.result.tokens is None:
            self.result.tokens = _token_store((self._num_clips, *tokens.shape[1:]))
        assert isinstance(self.result.tokens, np.ndarray)
        self.result.tokens[numbers] = tokens


def _cached_name(variant: str, number: int) -> str:
    """Return a variant's name in the cache; an altered clip may depend on its number."""
    return f"{variant}@{number}" if variant else "embedding"


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
            "check its weights, and whether it runs in half precision"
        )
    return np.asarray(array)
