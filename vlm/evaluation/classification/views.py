"""The views of a video that a protocol asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, cat

from vlm.data.decoding import open_video
from vlm.data.frame_sampling import dense_view, middle_frames, segment_view, shifted_view
from vlm.data.preprocessing import fit_crops
from vlm.evaluation.classification.protocol import ClassificationProtocol
from vlm.types import Preprocessing


def load_views(path: Path, p: Preprocessing, protocol: ClassificationProtocol) -> Tensor:
    """Return every view of a video, (clips * crops, t, 3, s, s) uint8: the crops of a clip side by side.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    with open_video(path) as video:
        chosen = choose_frames(video.info.num_frames, p.num_frames, protocol)
        needed, place = np.unique(np.concatenate(chosen), return_inverse=True)
        frames = video.read(needed)
    places = place.reshape(protocol.clips, p.num_frames)
    return cat([fit_crops(frames[clip], p, protocol.crops) for clip in places])


def choose_frames(
    num_available: int, num_frames: int, protocol: ClassificationProtocol
) -> list[NDArray[np.int64]]:
    """Return the frames of each view in time, each (num_frames,) ascending."""
    clips = range(protocol.clips)
    if protocol.sampling == "dense":
        return [dense_view(num_available, num_frames, protocol.stride, clip, len(clips)) for clip in clips]
    if protocol.sampling == "middle":
        return [middle_frames(num_available, num_frames)]
    view = segment_view if protocol.sampling == "segments" else shifted_view
    return [view(num_available, num_frames, clip, len(clips)) for clip in clips]
