"""Frames by number and time, on videos whose frames carry their number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.data.decoding import DecodeLimits, iter_segments, open_video, probe, read_frames
from vlm.errors import DataError

Kind = tuple[str, Path, list[np.ndarray]]
Reader = Callable[[np.ndarray], int]


def test_every_frame_is_found_by_its_number(kind: Kind, read_number: Reader) -> None:
    name, path, frames = kind
    video = open_video(path)
    assert video.info.num_frames == len(frames)
    found = [read_number(frame) for _, frame in video.iterate(np.arange(len(frames)))]
    assert found == list(range(len(frames)))


def test_random_picks_equal_reading_everything(kind: Kind, read_number: Reader) -> None:
    """Seeking and skipping must not change a single bit of a frame."""
    name, path, frames = kind
    everything = np.stack([frame for _, frame in open_video(path).iterate(np.arange(len(frames)))])
    rng = np.random.default_rng(1)
    for _ in range(6):
        picks = rng.integers(len(frames), size=rng.integers(1, 9))
        read = read_frames(path, picks)
        assert [read_number(frame) for frame in read] == picks.tolist()
        assert np.array_equal(read, everything[picks]), f"{name}: {picks}"


def test_bytes_give_the_same_frames_as_the_file(kind: Kind) -> None:
    name, path, frames = kind
    picks = np.unique([0, len(frames) // 2, len(frames) - 1])
    assert np.array_equal(read_frames(path.read_bytes(), picks), read_frames(path, picks))


def test_size_and_orientation_of_the_result(kind: Kind) -> None:
    name, path, frames = kind
    info = probe(path)
    assert (info.height, info.width) == frames[0].shape[:2]
    assert info.rotation == 0
    read = read_frames(path, [0])
    assert read.shape == (1, *frames[0].shape)
    assert read.dtype == np.uint8
    # rgb8 GIFs and lossy codecs are off by a little; a swapped channel or a mirror image by a lot
    assert np.abs(read[0].astype(int) - frames[0]).mean() < 20


@pytest.mark.parametrize("start", [0, 7000])
def test_times_of_a_variable_rate(tmp_path: Path, encode, numbered, read_number, start: int) -> None:
    pts = [start, start + 20, start + 400, start + 450, start + 2000, start + 2040]
    path = tmp_path / "v.mkv"
    encode(path, numbered(6), pts=pts, preset="ultrafast")
    video = open_video(path)
    assert video.times_s == pytest.approx([0, 0.02, 0.4, 0.45, 2.0, 2.04], abs=1e-9)
    assert video.info.is_variable
    assert video.info.start_s == pytest.approx(start / 1000)
    asked = [0.0, 0.019, 0.02, 0.3999, 0.4, 1.9, 2.0, 99.0]
    shown = [0, 0, 1, 1, 2, 3, 4, 5]
    assert [read_number(frame) for frame in read_frames(path, times_s=asked)] == shown


def test_duration_ends_with_the_last_frame(tmp_path: Path, encode, numbered) -> None:
    path = tmp_path / "v.mp4"
    encode(path, numbered(50), fps=25, preset="ultrafast", bf="2")
    info = probe(path)
    assert info.duration_s == pytest.approx(2.0, abs=1e-3)
    assert info.fps == pytest.approx(25, abs=0.02)
    assert not info.is_variable
    assert info.codec == "h264"
    assert not info.has_audio


@pytest.mark.parametrize(("matrix", "clockwise"), [(-90, 90), (90, 270), (180, 180)])
def test_rotation_is_applied(tmp_path: Path, encode, numbered, matrix: int, clockwise: int) -> None:
    frames = numbered(5)
    encode(tmp_path / "flat.mp4", frames, preset="ultrafast", qp="0")
    encode(tmp_path / "turned.mp4", frames, preset="ultrafast", qp="0", rotation=matrix)
    info = probe(tmp_path / "turned.mp4")
    assert info.rotation == clockwise
    flat, turned = read_frames(tmp_path / "flat.mp4", [3])[0], read_frames(tmp_path / "turned.mp4", [3])[0]
    if clockwise == 90:  # clockwise: the left column, read from the bottom, becomes the top row
        assert np.array_equal(turned[0], flat[::-1, 0])
    elif clockwise == 270:
        assert np.array_equal(turned[0], flat[:, -1])
    else:
        assert np.array_equal(turned, flat[::-1, ::-1])
    assert (info.height, info.width) == turned.shape[:2]


def test_seeking_reads_only_what_is_needed(tmp_path: Path, encode, numbered, monkeypatch) -> None:
    """Reading one late frame of a video with many key frames must not decode the whole."""
    from vlm.data.decoding import video as module

    path = tmp_path / "v.mp4"
    encode(path, numbered(300), g="10", preset="ultrafast")
    opened = open_video(path)
    decoded = []
    original = module.decode_packet
    monkeypatch.setattr(module, "decode_packet", lambda c, p: decoded.append(p) or original(c, p))
    opened.read([290])
    assert len(decoded) <= 13


def test_a_lying_seek_table_is_noticed(tmp_path: Path, encode, numbered, read_number, monkeypatch) -> None:
    """If seeking lands behind the key frame, the video is read from its start instead."""
    path = tmp_path / "v.mp4"
    encode(path, numbered(60), g="10", preset="ultrafast")
    video = open_video(path)
    timeline = video._timeline
    shifted = timeline.key_dts + (timeline.key_dts[2] - timeline.key_dts[0])
    monkeypatch.setattr(video, "_timeline", _replaced(timeline, key_dts=shifted))
    assert [read_number(frame) for frame in video.read([5, 25, 47])] == [5, 25, 47]
    assert not video._timeline.is_seekable


def test_promised_frames_that_do_not_decode_are_stood_in_for(
    tmp_path: Path, encode, numbered, read_number
) -> None:
    """Zeroes in the middle of the data: every number still gives a frame, and never a later one."""
    path = tmp_path / "v.mp4"
    encode(path, numbered(120), g="10", preset="ultrafast", movflags="faststart")
    data = bytearray(path.read_bytes())
    middle = len(data) * 6 // 10
    data[middle : middle + len(data) // 20] = bytes(len(data) // 20)
    path.write_bytes(bytes(data))
    video = open_video(path)
    assert video.info.num_frames == 120
    frames = [frame for _, frame in video.iterate(np.arange(120))]
    assert len(frames) == 120
    numbers = [read_number(frame) for frame in frames]
    assert numbers[:50] == list(range(50))
    assert numbers[-5:] == [115, 116, 117, 118, 119]


def test_segments_share_frames_and_keep_their_order(clip: Path, read_number: Reader) -> None:
    segments = [(0.0, 0.8), (0.4, 1.2), (0.8, 1.6), (1.2, 99.0)]
    found = list(iter_segments(clip, segments, 4))
    assert [item.number for item in found] == [0, 1, 2, 3]
    # 25 fps: the first segment holds frames 0..19, whose 4 spans have the middles 2, 7, 12, 17
    numbers = [[read_number(frame) for frame in item.frames] for item in found]
    assert numbers == [[2, 7, 12, 17], [12, 17, 22, 27], [22, 27, 32, 37], [30, 33, 35, 38]]
    assert found[1].times_s == pytest.approx(np.array([12, 17, 22, 27]) / 25, abs=1e-3)


def test_overlapping_segments_decode_each_frame_once(clip: Path, monkeypatch) -> None:
    from vlm.data.decoding import video as module

    video = open_video(clip)
    decoded = []
    original = module.decode_packet
    monkeypatch.setattr(module, "decode_packet", lambda c, p: decoded.append(p) or original(c, p))
    list(video.iter_segments([(n * 0.04, n * 0.04 + 0.8) for n in range(20)], 8))
    assert len(decoded) <= 41  # the packets of the file, once, and the drain


def test_segments_in_any_order(clip: Path) -> None:
    segments = [(1.0, 1.5), (0.0, 0.5), (0.5, 1.0)]
    forward = {item.number: item.frames for item in iter_segments(clip, segments, 3)}
    for number, segment in enumerate(segments):
        (alone,) = iter_segments(clip, [segment], 3)
        assert np.array_equal(alone.frames, forward[number])


@pytest.mark.parametrize("indices", [[-1], [40], [0, 400]])
def test_indices_out_of_range(clip: Path, indices: list[int]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 40\)"):
        read_frames(clip, indices)


def test_either_indices_or_times(clip: Path) -> None:
    with pytest.raises(ValueError, match="either indices or times_s"):
        read_frames(clip)
    with pytest.raises(ValueError, match="either indices or times_s"):
        read_frames(clip, [0], times_s=[0.0])


def test_no_frames_asked_for_gives_none(clip: Path) -> None:
    assert read_frames(clip, []).shape == (0, 64, 160, 3)


def test_a_result_beyond_the_limit(clip: Path) -> None:
    with pytest.raises(ValueError, match="exceed the limit"):
        read_frames(clip, range(40), limits=DecodeLimits(max_result_bytes=100_000))


def test_time_limit(clip: Path) -> None:
    with pytest.raises(DataError, match="took longer") as caught:
        open_video(clip, DecodeLimits(max_seconds=0.0))
    assert caught.value.reason == "timeout"


def test_time_spent_by_the_caller_does_not_count(clip: Path) -> None:
    import time

    video = open_video(clip, DecodeLimits(max_seconds=0.5))
    seen = []
    for number, _ in video.iterate([0, 39]):
        seen.append(number)
        if number == 0:
            time.sleep(0.6)
    assert seen == [0, 39]


def _replaced(timeline, **changes):
    import dataclasses

    return dataclasses.replace(timeline, **changes)
