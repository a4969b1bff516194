"""Clips side by side: one tensor of videos, their captions, and which caption is true of which video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm.data.preprocessing import normalise
from vlm.types import Batch, Preprocessing, TokenBatch

BadPlace: TypeAlias = tuple[int, int, int]  # a sample that cannot be used: corpus, shard, number in it


class Visit(NamedTuple):
    """A sample's turn: which pass over its corpus, where it lies, and whether it could be used."""

    epoch: int
    shard: int
    number: int
    is_seen: bool


class Report(NamedTuple):
    """What a process did with its part of a global batch, for the accounts that all processes keep alike.

    Attributes:
        corpus: By number.
        stop: Samples of the corpus's passes, laid end to end, up to the end of the batch.
        visits: In order; each sample of the part once, whether it could be used or not.
        bad: The samples that the process found unusable since its report before.
    """

    corpus: int
    stop: int
    visits: tuple[Visit, ...] = ()
    bad: tuple[BadPlace, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A sample made ready.

    Attributes:
        key: Its name, unique in its origin.
        origin: Corpus and source that it comes from; empty where there is one only.
        pixels: (t, 3, s, s) uint8.
        caption: The one chosen for this visit.
        text: The caption as it is read, in the corpus's wording.
        captions: All of them.
        metadata: What else is known.
    """

    key: str
    origin: str = ""
    pixels: npt.NDArray[np.uint8]
    caption: str
    text: str
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """Its name, unique among all clips of a run."""
        return identify(self.origin, self.key)


def identify(origin: str, key: str) -> str:
    """Return the name of a clip that is unique in a run, from where it comes from and its name there."""
    return f"{origin}/{key}" if origin else key


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """This process's part of a global batch.

    Attributes:
        clips: b of them; may be none in the last batch of a short epoch.
        pixels: (b, t, 3, s, s) uint8, resized but not yet normalised.
        preprocessing: How they were made; `video` uses its mean and std.
        corpus: Name of the corpus that all of them are of.
        consumed: Batches of the global sequence up to the end of this one: pass it as ``start`` to go on.
        epoch: Of the batch's first sample, in its corpus.
        offset: Place of this part's first clip in the global batch.
        global_size: Clips of the global batch, rejected ones included.
        report: What was done with this part.
    """

    clips: tuple[Clip, ...]
    pixels: Tensor
    preprocessing: Preprocessing
    consumed: int
    epoch: int
    offset: int
    global_size: int
    corpus: str = ""
    report: Report

    def video(self, device: torch.device | str = "cpu") -> Tensor:
        """Return (b, t, 3, s, s) float32 on the device, preprocessed."""
        return normalise(self.pixels.to(device), self.preprocessing)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the clips, unique in a run."""
        return tuple(clip.identity for clip in self.clips)

    @property
    def captions(self) -> tuple[str, ...]:
        """The chosen caption of each clip."""
        return tuple(clip.caption for clip in self.clips)

    @property
    def texts(self) -> tuple[str, ...]:
        """The chosen captions as they are read."""
        return tuple(clip.text for clip in self.clips)


def stack_clips(
    clips: Sequence[Clip],
    p: Preprocessing,
    *,
    corpus: str = "",
    consumed: int,
    epoch: int = 0,
    offset: int = 0,
    global_size: int | None = None,
    report: Report,
) -> ClipBatch:
    """Stack clips of equal shape."""
    shape = (0, p.num_frames, 3, p.image_size, p.image_size)
    pixels = np.stack([clip.pixels for clip in clips]) if clips else np.zeros(shape, np.uint8)
    return ClipBatch(
        clips=tuple(clips),
        pixels=torch.from_numpy(pixels),
        preprocessing=p,
        corpus=corpus,
        consumed=consumed,
        epoch=epoch,
        offset=offset,
        global_size=len(clips) if global_size is None else global_size,
        report=report,
    )


def true_pairs(keys: Sequence[str], captions: Sequence[str], all_captions: Sequence[Sequence[str]]) -> Tensor:
    """Return (n, n) bool: caption j is known to be true of video i.

    That is so if both are of the same video, or if j's text is among the captions of i.
    """
    same_key, saying = dict[str, list[int]](), dict[str, list[int]]()
    for j, (key, caption) in enumerate(zip(keys, captions, strict=True)):
        same_key.setdefault(key, []).append(j)
        saying.setdefault(caption, []).append(j)
    # by what is equal, not pair by pair: batches of thousands have millions of pairs
    known = np.zeros((len(keys), len(keys)), dtype=bool)
    for i, (key, texts) in enumerate(zip(keys, all_captions, strict=True)):
        known[i, same_key[key]] = True
        for text in texts:
            known[i, saying.get(text, [])] = True
    return torch.from_numpy(known)


def make_batch(batch: ClipBatch, tokenize: Callable[[list[str]], TokenBatch]) -> Batch:
    """Return the batch of a single process, its captions tokenised.

    Several processes gather keys and captions first and call `true_pairs` on the whole.
    """
    clips = batch.clips
    positives = true_pairs(batch.keys, batch.captions, [clip.captions for clip in clips])
    return Batch(
        video=batch.video(),
        text=tokenize(list(batch.texts)),
        positives=positives,
        offset=batch.offset,
        keys=batch.keys,
    )
