"""Copies: hashes against a slow formula, alignment against known cuts, and groups of hits everywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.duplicates.alignment import Frames, find_overlap
from vlm.retrieval.duplicates.hashing import NO_HASH, grey_of, hash_frames
from vlm.types import Preprocessing

PLAIN = (np.full(3, 1 / 3), 0.0)
FPS = 8


def footage(seed: int, seconds: float, side: int = 64) -> np.ndarray:
    """Return (frames, side, side, 3) uint8: soft blobs that wander and are replaced every two seconds."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, side)] * 2, indexing="ij"))
    frames = []
    for number in range(round(seconds * FPS)):
        if number % (2 * FPS) == 0:
            centres, ways = rng.random((12, 2)), rng.normal(0, 0.01, (12, 2))
            weights, widths = rng.normal(0, 60, 12), rng.uniform(0.1, 0.3, 12)
        places = centres + ways * (number % (2 * FPS))
        squares = ((grid[None] - places[:, :, None, None]) ** 2).sum(axis=1)
        field = 128 + (weights[:, None, None] * np.exp(-squares / widths[:, None, None] ** 2)).sum(axis=0)
        frames.append(np.repeat(np.clip(field, 0, 255)[:, :, None], 3, axis=2))
    return np.stack(frames).astype(np.uint8)


def write(path: Path, frames: np.ndarray, size: tuple[int, int] = (64, 64), crf: int = 20) -> Path:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = *size, "yuv420p", 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(*size, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def distance(one: np.uint64, other: np.uint64) -> int:
    return int(one ^ other).bit_count()


def test_a_hash_is_the_signs_of_the_slow_waves() -> None:
    pixels = np.random.default_rng(0).uniform(0, 255, (32, 32))
    waves = [
        sum(
            pixels[y, x] * math.cos(math.pi * u * (y + 0.5) / 32) * math.cos(math.pi * v * (x + 0.5) / 32)
            for y in range(32)
            for x in range(32)
        )
        for u in range(1, 9)
        for v in range(1, 9)
    ]
    bits = "".join(str(int(wave > np.median(waves))) for wave in waves)
    (found,) = hash_frames(np.repeat(pixels[None, None], 3, axis=1), PLAIN)
    assert "".join(f"{byte:08b}" for byte in found.tobytes()) == bits


def test_a_hash_survives_size_and_brightness_and_tells_pictures_apart() -> None:
    frames = footage(1, 16)[::16].transpose(0, 3, 1, 2).astype(np.float32)
    hashes = hash_frames(frames, PLAIN)
    smaller = hash_frames(frames.reshape(8, 3, 32, 2, 32, 2).mean(axis=(3, 5)), PLAIN)
    dimmer = hash_frames(frames * 0.6 + 20, PLAIN)
    for number in range(8):
        assert distance(hashes[number], smaller[number]) <= 2
        assert distance(hashes[number], dimmer[number]) <= 2
        assert all(distance(hashes[number], hashes[other]) > 14 for other in range(8) if other != number)


def test_preprocessed_frames_hash_as_their_pixels_do() -> None:
    frames = footage(2, 1).transpose(0, 3, 1, 2).astype(np.float32)
    settings = Preprocessing()
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (settings.mean, settings.std))
    prepared = (frames / 255 - mean) / std
    assert (hash_frames(prepared, grey_of(settings)) == hash_frames(frames, PLAIN)).all()


def test_flat_frames_have_no_hash_and_are_like_nothing() -> None:
    flat = hash_frames(np.full((9, 3, 48, 40), 77.0, np.float32), PLAIN)
    assert (flat == NO_HASH).all()
    frames = Frames(times_s=np.arange(9.0), hashes=flat)
    assert find_overlap(frames, frames, 0.0, 8.0) is None


def hashed(seed: int, seconds: int) -> np.ndarray:
    """Return one hash for each second, none like another."""
    return np.random.default_rng(seed).integers(1, 2**63, seconds, np.uint64)


def test_the_common_stretch_is_found_where_it_lies() -> None:
    own, foreign = hashed(1, 40), hashed(2, 60)
    foreign[30:45] = own[10:25] ^ np.uint64(0b1011)  # seconds 10 to 25 appear 20 s later, slightly changed
    foreign[35] = 12345  # one frame of them is another
    one = Frames(times_s=np.arange(40) + 0.5, hashes=own)
    other = Frames(times_s=np.arange(60) + 0.5, hashes=foreign)
    found = find_overlap(one, other, 12.0, 20.0)
    assert (found.start_s, found.end_s, found.other_start_s, found.other_end_s) == (10, 25, 30, 45)
    back = find_overlap(other, one, 32.0, 40.0)
    assert (back.start_s, back.other_start_s, back.other_end_s) == (30, 10, 25)
    assert find_overlap(one, other, 28.0, 36.0) is None  # the moment itself is not in it
    assert find_overlap(one, Frames(times_s=np.zeros(0), hashes=np.zeros(0, np.uint64)), 12.0, 20.0) is None


def test_footage_turned_round_is_no_copy() -> None:
    # frame by frame one bit more differs, so each of them is like each other
    drifting = np.uint64(2**63) + (np.uint64(1) << np.arange(12, dtype=np.uint64)) - np.uint64(1)
    one = Frames(times_s=np.arange(12.0), hashes=drifting)
    backwards = Frames(times_s=np.arange(12.0), hashes=drifting[::-1])
    assert find_overlap(one, backwards, 0.0, 11.0) is None
    noisy = Frames(times_s=np.arange(12.0), hashes=drifting ^ np.uint64(2**62))
    assert find_overlap(one, noisy, 0.0, 11.0) is not None
    still = Frames(times_s=np.arange(12.0), hashes=drifting[:1].repeat(12))
    assert find_overlap(still, still.turned(), 0.0, 11.0) is not None


def test_frames_of_overlapping_segments_come_once_and_in_order() -> None:
    bounds = np.array([[4.0, 12.0], [0.0, 8.0]])
    hashes = np.array([[5, 6, 7, 8], [3, 4, 5, 6]], np.uint64)
    frames = Frames.of_segments(bounds, hashes)
    assert frames.times_s.tolist() == [1, 3, 5, 7, 9, 11]
    assert frames.hashes.tolist() == [3, 4, 5, 6, 7, 8]


def test_frames_of_a_grid_are_known_by_its_times() -> None:
    # the last segment begins at no time of the grid, whose step is 2 s, and shows frames of it all the same
    bounds = np.array([[0.0, 8.0], [1.3, 9.3]])
    hashes = np.array([[3, 4, 5, 6], [4, 5, 6, 7]], np.uint64)
    frames = Frames.of_segments(bounds, hashes, 2.0)
    assert frames.times_s.tolist() == [1, 3, 5, 7, 9]
    assert frames.hashes.tolist() == [3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def copies(tmp_path_factory, make_encoder) -> Path:
    """An index of a video, a small harsh copy of its seconds 6 to 26, and another video."""
    folder = tmp_path_factory.mktemp("copies")
    whole = footage(5, 30)
    write(folder / "v" / "a.mp4", whole)
    write(folder / "v" / "b.mp4", whole[6 * FPS : 26 * FPS], (48, 40), crf=30)
    write(folder / "v" / "c.mp4", footage(6, 20))
    model = make_encoder(num_frames=8)
    index = VideoIndex.create(folder / "i", model)
    assert index.add([folder / "v"], model=model).num_added == 3
    return folder / "i"


def name(path: str) -> str:
    return os.path.basename(path)


def test_copies_are_named_with_the_hit(copies, make_encoder) -> None:
    searcher = Searcher(VideoIndex.open(copies), make_encoder(num_frames=8))
    flat = searcher.search("red", group=False)
    assert len(flat) == 3 and not any(hit.duplicates for hit in flat)
    middle = searcher.encode_segment(next(h.video_id for h in flat if name(h.path) == "a.mp4"), 12.0)
    hits = searcher.search(middle)
    assert sorted(name(hit.path)[0] for hit in hits) in (["a", "c"], ["b", "c"])
    (leader,) = [hit for hit in hits if name(hit.path) != "c.mp4"]
    (copy,) = leader.duplicates
    shift = 6.0 if name(leader.path) == "b.mp4" else -6.0
    assert copy.start_s - copy.own_start_s == pytest.approx(shift, abs=0.6)
    assert copy.end_s - copy.own_end_s == pytest.approx(shift, abs=0.6)
    assert copy.own_end_s - copy.own_start_s == pytest.approx(20, abs=2)
    assert [hit.rank for hit in hits] == [1, 2]


def test_pages_of_groups_join_to_the_whole(copies, make_encoder) -> None:
    searcher = Searcher(VideoIndex.open(copies), make_encoder(num_frames=8))
    whole = searcher.search("green")
    pages = [hit for offset in range(3) for hit in searcher.search("green", top_k=1, offset=offset)]
    assert pages == whole


def test_the_command_line_lists_copies_below_their_hit(copies, make_encoder, capsys, monkeypatch) -> None:
    from vlm.cli import main

    monkeypatch.setattr("vlm.cli.index.load", lambda source: (make_encoder(num_frames=8), source))
    first = Searcher(VideoIndex.open(copies), make_encoder(num_frames=8)).search("red", group=False)
    video_id = next(hit.video_id for hit in first if name(hit.path) == "a.mp4")
    query = [str(copies), "--plus", f"like:{video_id}@12"]
    assert main(["search", *query]) == 0
    assert capsys.readouterr().out.count("also in") == 1
    assert main(["search", *query, "--no-group", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_hashes_follow_their_videos_through_compaction(copies, tmp_path) -> None:
    from vlm.retrieval.upkeep.compaction import compact

    def hashes(index: VideoIndex) -> dict[str, list[int]]:
        shot = index.snapshot
        return {
            video.video_id: shot.row_hashes[shot.row_video == place].ravel().tolist()
            for place, video in enumerate(shot.videos)
        }

    folder = shutil.copytree(copies, tmp_path / "i")
    index = VideoIndex.open(folder)
    before = hashes(index)
    gone = next(iter(before))
    index.remove([gone])
    compact(index)
    assert hashes(VideoIndex.open(folder)) == {k: v for k, v in before.items() if k != gone}
