"""Hard cuts are found in clips joined by hand, and motion, flashes and fades are not taken for them."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Opened
from vlm.retrieval.ingest.pool import decode_files
from vlm.retrieval.shots import FRAMES_PER_SECOND, cut_shots, find_cuts, sample_times
from vlm.types import Preprocessing

SIZE = 96


def texture(seed: int, width: int = SIZE) -> np.ndarray:
    """Return a picture (96, width, 3) of soft blobs, as different seeds give different places."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((6, max(2, width // 16), 3))
    picture = np.kron(coarse, np.ones((16, 16, 1)))[:SIZE, :width]
    return (255 * picture).astype(np.uint8)


def timed(frames: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
    return [(number / FRAMES_PER_SECOND, frame) for number, frame in enumerate(frames)]


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def pan(seed: int, count: int, step: int) -> list[np.ndarray]:
    wide = texture(seed, SIZE + count * step)
    return [wide[:, i * step : i * step + SIZE] for i in range(count)]


class TestDetector:
    @pytest.mark.parametrize("step", [0, 2, 6])
    def test_cuts_between_still_and_moving_shots(self, step) -> None:
        rng = np.random.default_rng(0)
        shots = [pan(seed, count, step) for seed, count in ((1, 24), (2, 17), (3, 40))]
        frames = [noisy(frame, rng) for shot in shots for frame in shot]
        assert find_cuts(timed(frames)) == [24 / FRAMES_PER_SECOND, 41 / FRAMES_PER_SECOND]

    def test_a_cut_between_shots_of_the_same_colours(self) -> None:
        picture = texture(4)
        frames = [picture] * 20 + [np.ascontiguousarray(picture[:, ::-1])] * 20
        assert find_cuts(timed(frames)) == [20 / FRAMES_PER_SECOND]

    def test_a_cut_on_a_black_ground(self) -> None:
        frames = []
        for where in (10, 60):
            for i in range(24):
                frame = np.zeros((SIZE, SIZE, 3), np.uint8)
                frame[where : where + 28, 5 + i : 33 + i] = 230
                frames.append(frame)
        assert find_cuts(timed(frames)) == [24 / FRAMES_PER_SECOND]

    @pytest.mark.parametrize("kind", ["still", "noise", "pan", "fast pan", "flash", "fade", "darkening"])
    def test_what_is_no_cut(self, kind) -> None:
        rng, picture = np.random.default_rng(1), texture(5)
        other = texture(6)
        frames = {
            "still": [picture] * 30,
            "noise": [noisy(picture, rng) for _ in range(30)],
            "pan": pan(7, 40, 3),
            "fast pan": pan(8, 40, 12),
            "flash": [np.full_like(picture, 255) if i == 15 else picture for i in range(30)],
            "fade": [(picture * (1 - i / 29) + other * (i / 29)).astype(np.uint8) for i in range(30)],
            "darkening": [(picture * (1 - i / 40)).astype(np.uint8) for i in range(30)],
        }[kind]
        assert find_cuts(timed(frames)) == []

    def test_very_short_videos(self) -> None:
        assert find_cuts([]) == [] and find_cuts(timed([texture(1)])) == []
        assert find_cuts(timed([texture(1), texture(2)])) == [1 / FRAMES_PER_SECOND]

    def test_odd_shapes(self) -> None:
        for shape in ((1, 1, 3), (3, 200, 3), (17, 5, 3)):
            a, b = np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)
            assert find_cuts(timed([a] * 9 + [b] * 9)) == [9 / FRAMES_PER_SECOND]


def test_few_frames_are_looked_at() -> None:
    chosen = sample_times(np.arange(0, 10, 1 / 50))
    assert len(chosen) == 80 and np.all(np.diff(chosen) >= 6)
    assert sample_times(np.arange(5) / 2.0).tolist() == [0, 1, 2, 3, 4]
    # a gap in the video leaves no frame out behind it
    assert sample_times(np.array([0.0, 0.05, 9.0, 9.3])).tolist() == [0, 2, 3]


class TestSegments:
    def test_no_segment_crosses_a_cut(self) -> None:
        segments = cut_shots(40.0, [5.0, 25.0], 8.0, 4.0)
        assert segments[0] == (0.0, 5.0) and segments[-1] == (32.0, 40.0)
        assert all(b <= 5 or (a >= 5 and b <= 25) or a >= 25 for a, b in segments)
        assert {(5.0, 13.0), (17.0, 25.0), (25.0, 33.0)} < set(segments)

    def test_everything_is_covered_whatever_the_cuts(self) -> None:
        rng = np.random.default_rng(2)
        for _ in range(200):
            duration = float(rng.uniform(0.1, 60))
            cuts = sorted(rng.uniform(0, duration, rng.integers(0, 9)).tolist())
            segments = cut_shots(duration, cuts, 8.0, 4.0)
            assert segments[0][0] == 0 and segments[-1][1] == pytest.approx(duration, abs=0.051)
            reached = 0.0
            for start, end in segments:
                assert start <= reached + 1e-6 and end > start
                reached = max(reached, end)
            assert reached == pytest.approx(duration, abs=0.051)

    def test_shots_under_a_second_join_their_neighbour(self) -> None:
        assert cut_shots(6.0, [0.4, 3.0, 3.5, 5.5], 8.0, 4.0) == [(0.0, 3.0), (3.0, 6.0)]


def test_decoded_clips_joined_by_hand(tmp_path, clip, colours) -> None:
    path = clip(tmp_path / "a.mp4", [(colours.red, 3), (colours.blue, 12), (colours.green, 2)], fps=25)
    preprocessing = Preprocessing(num_frames=2, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    settings = DecodeSettings(preprocessing=preprocessing, segmentation="shots")
    opened, *others = decode_files([path], settings)
    assert isinstance(opened, Opened)
    expected = [(0, 3), (3, 11), (7, 15), (15, 17)]
    np.testing.assert_allclose(opened.segments, expected, atol=1 / FRAMES_PER_SECOND)
    strongest = [int(e.video.mean(axis=(0, 2, 3)).argmax()) for e in others if isinstance(e, DecodedSegment)]
    assert strongest == [0, 2, 2, 1]


def test_joined_clips_of_the_digit_world(tmp_path) -> None:
    # little changes from clip to clip: a few digits on black
    from vlm.data.decoding import open_video
    from vlm.world import sample_scene
    from vlm.world.clips import write_clips

    scenes = [sample_scene("train", 1, index) for index in range(5)]
    write_clips(scenes, tmp_path)
    clips = []
    for scene in scenes:
        with open_video(tmp_path / f"{scene.clip_id}.mp4") as video:
            clips.append([frame for _, frame in video.iterate(sample_times(video.times_s))])
    joined = [frame for clip in clips for frame in clip]
    joins = np.cumsum([len(clip) for clip in clips])[:-1] / FRAMES_PER_SECOND
    assert find_cuts(timed(joined)) == joins.tolist()


def test_an_index_by_shots_finds_the_shot(tmp_path, clip, colours, make_encoder) -> None:
    model = make_encoder()
    clip(tmp_path / "v" / "a.mp4", [(colours.grey, 5), (colours.red, 3), (colours.grey, 6)])
    index = VideoIndex.create(tmp_path / "i", model, segmentation="shots")
    index.add([tmp_path / "v"], model=model)
    hit = Searcher(VideoIndex.open(tmp_path / "i"), model).search("red")[0]
    assert (hit.start_s, hit.end_s) == pytest.approx((5, 8), abs=0.25)
    assert index.info()["segmentation"] == "shots"


def test_a_long_video_does_not_run_out_of_time(tmp_path, clip, colours, monkeypatch) -> None:
    # looking for cuts takes longer than one segment may, but says that it goes on
    path = clip(tmp_path / "a.mp4", [(colours.red, 60), (colours.blue, 60)], fps=8, size=(320, 240))
    preprocessing = Preprocessing(num_frames=2, image_size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    settings = DecodeSettings(
        preprocessing=preprocessing, segmentation="shots", patience_s=1.0, segment_s=60.0, stride_s=60.0
    )
    opened, *_ = decode_files([path], settings)
    assert isinstance(opened, Opened) and len(opened.segments) == 2
