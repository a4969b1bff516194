"""A collection of ordinary, odd and broken files: each gives its frames or a reason, as its list says."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from vlm.data.decoding import open_video
from vlm.data.frame_sampling import middle_frames
from vlm.errors import DataError


@pytest.mark.slow
def test_every_file_gives_its_frames_or_a_reason(shared: Path) -> None:
    folder = shared / "videos"
    if not (folder / "manifest.csv").exists():
        pytest.skip(f"no {folder}/manifest.csv")
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) >= 100
    wrong, reasons = [], {}
    for row in rows:
        expected = int(row["frames_decoded"] or 0)
        try:
            video = open_video(folder / row["file"])
        except DataError as error:
            reasons[row["file"]] = error.reason
            if expected:
                wrong.append(f"{row['file']}: {expected} frames expected, got {error}")
            continue
        info = video.info
        if info.num_frames != expected:
            wrong.append(f"{row['file']}: {expected} frames expected, got {info.num_frames}")
            continue
        degrees = int(row["rotation"] or 0)
        if info.rotation != -degrees % 360:
            wrong.append(f"{row['file']}: rotation {degrees} expected, got {info.rotation}")
        frames = video.read(middle_frames(info.num_frames, 8))
        assert frames.shape == (8, info.height, info.width, 3)
        times = video.times_s
        if not (np.diff(times) > 0).all() or times[0] != 0 or not info.duration_s > times[-1]:
            wrong.append(f"{row['file']}: times do not ascend")
    assert not wrong, "\n".join(wrong)
    assert {"empty", "not_a_video", "no_frames", "audio_only", "encrypted"} <= set(reasons.values())


@pytest.mark.parametrize(
    "file",
    [
        "real/msvd_j2Dhf-xFUxU_13_20.avi",  # times run backwards
        "odd/hfdatasets_test_video_66x50.mov",  # an edit list hides the first frames
        "odd/androidx_iibbibb_editlist_videoonly.mp4",  # the first key frame is the third frame
        "odd/torchcodec_h265_10bits.mp4",
        "odd/torchcodec_av1_video.mkv",
        "real/videojs_bipbop0.ts",
        "real/panda3d_PandaSneezes.ogv",  # packets without data
        "odd/vpf_test_res_change.h264",  # no times at all, and the size changes
    ],
)
def test_random_picks_equal_reading_everything(shared: Path, file: str) -> None:
    path = shared / "videos" / file
    if not path.exists():
        pytest.skip(f"no {path}")
    video = open_video(path)
    count = min(video.info.num_frames, 120)
    everything = [frame for _, frame in video.iterate(np.arange(count))]
    rng = np.random.default_rng(3)
    for _ in range(4):
        picks = rng.integers(count, size=5)
        read = open_video(path).read(picks)
        assert all(np.array_equal(read[i], everything[pick]) for i, pick in enumerate(picks))
