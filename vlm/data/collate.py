"""Clips side by side: one tensor of videos, their captions, and which caption is true of which video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlm.data.preprocessing import normalise
from vlm.types import Batch, Preprocessing, TokenBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A sample made ready.

    Attributes:
        key: Its name.
        pixels: (t, 3, s, s) uint8.
        caption: The one chosen for this visit.
        captions: All of them.
        metadata: What else is known.
    """

    key: str
    pixels: npt.NDArray[np.uint8]
    caption: str
    captions: tuple[str, ...]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """This process's part of a global batch.

    Attributes:
        clips: b of them; may be none in the last batch of a short epoch.
        pixels: (b, t, 3, s, s) uint8, resized but not yet normalised.
        preprocessing: How they were made; `video` uses its mean and std.
        consumed: Samples of the global sequence up to the end of this batch: pass it as ``start`` to go on.
        epoch: Of the batch's first sample.
        offset: Place of this part's first clip in the global batch.
        global_size: Clips of the global batch, rejected ones included.
        rejected: (shard, number) of the samples that this process found unusable since the batch before.
    """

    clips: tuple[Clip, ...]
    pixels: Tensor
    preprocessing: Preprocessing
    consumed: int
    epoch: int
    offset: int
    global_size: int
    rejected: tuple[tuple[int, int], ...] = ()

    def video(self, device: torch.device | str = "cpu") -> Tensor:
        """Return (b, t, 3, s, s) float32 on the device, preprocessed."""
        return normalise(self.pixels.to(device), self.preprocessing)

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the clips."""
        return tuple(clip.key for clip in self.clips)

    @property
    def captions(self) -> tuple[str, ...]:
        """The chosen caption of each clip."""
        return tuple(clip.caption for clip in self.clips)


def stack_clips(
    clips: Sequence[Clip],
    p: Preprocessing,
    *,
    consumed: int,
    epoch: int = 0,
    offset: int = 0,
    global_size: int | None = None,
    rejected: tuple[tuple[int, int], ...] = (),
) -> ClipBatch:
    """Stack clips of equal shape."""
    shape = (0, p.num_frames, 3, p.image_size, p.image_size)
    pixels = np.stack([clip.pixels for clip in clips]) if clips else np.zeros(shape, np.uint8)
    return ClipBatch(
        clips=tuple(clips),
        pixels=torch.from_numpy(pixels),
        preprocessing=p,
        consumed=consumed,
        epoch=epoch,
        offset=offset,
        global_size=len(clips) if global_size is None else global_size,
        rejected=rejected,
    )


def true_pairs(keys: Sequence[str], captions: Sequence[str], all_captions: Sequence[Sequence[str]]) -> Tensor:
    """Return (n, n) bool: caption j is known to be true of video i.

    That is so if both are of the same video, or if j's text is among the captions of i.
    """
    known = [set(texts) for texts in all_captions]
    rows = [
        [keys[i] == keys[j] or captions[j] in known[i] for j in range(len(keys))] for i in range(len(keys))
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(keys), len(keys))


def make_batch(batch: ClipBatch, tokenize: Callable[[list[str]], TokenBatch]) -> Batch:
    """Return the batch of a single process, its captions tokenised.

    Several processes gather keys and captions first and call `true_pairs` on the whole.
    """
    clips = batch.clips
    positives = true_pairs(batch.keys, batch.captions, [clip.captions for clip in clips])
    return Batch(
        video=batch.video(),
        text=tokenize(list(batch.captions)),
        positives=positives,
        offset=batch.offset,
        keys=batch.keys,
    )
