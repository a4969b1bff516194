"""Towers see each frame of a video once: counted, and against vectors computed without an index."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.config import build as build_config
from vlm.errors import InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.duplicates import grouping
from vlm.retrieval.embedding import FeatureLayout, choose_grid, choose_layout
from vlm.retrieval.ingest.encoding import make_batches
from vlm.retrieval.ingest.estimating import estimate_build
from vlm.retrieval.ingest.events import DecodedSegment, DecodeSettings, Failed
from vlm.retrieval.manifest import Manifest
from vlm.retrieval.upkeep.merging import merge
from vlm.types import Preprocessing, TextFeatures, VideoFeatures

FPS, SIDE, DIM = 5, 32, 6
run = importlib.import_module("vlm.retrieval.ingest.run")


def picture(video: int, frame: int) -> np.ndarray:
    """Return a frame (32, 32, 3) uint8: 4 x 4 squares say which, in 11 bits, and of which video, in 5."""
    bits = np.array([(video << 11 | frame) >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4)
    return (bits.repeat(8, 0).repeat(8, 1)[..., None] * np.full(3, 255, np.uint8)).astype(np.uint8)


def read_back(frames: torch.Tensor) -> list[tuple[int, int]]:
    """Return video and frame of preprocessed pictures (n, 3, 32, 32)."""
    squares = frames.mean(dim=1).reshape(-1, 4, 8, 4, 8).mean(dim=(2, 4)).reshape(-1, 16) > 0.5
    numbers = (squares.long() * 2 ** torch.arange(16)).sum(dim=1)
    return [(number >> 11, number & 2047) for number in numbers.tolist()]


def vector_of(video: int, frame: int) -> np.ndarray:
    """Return what the tower below makes of a frame (6,): a direction that no other has."""
    vector = np.random.default_rng((video, frame)).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Tower:
    """A frame tower that counts what it sees."""

    kind, name, domain, fingerprint = "frames", "tower", "open", "tower-1"
    capabilities, device = frozenset({"search"}), torch.device("cpu")

    def __init__(self, num_frames: int = 8, rounding: float = 0.0) -> None:
        self.preprocessing = Preprocessing(
            num_frames=num_frames, image_size=SIDE, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        )
        self.seen: Counter[tuple[int, int]] = Counter()
        self.batches: list[int] = []
        # as in real ones, the last bits depend on how much is encoded at once
        self.rounding = rounding

    def encode_video(self, video: torch.Tensor) -> VideoFeatures:
        who = read_back(video.flatten(0, 1))
        self.seen.update(who)
        self.batches.append(len(who))
        vectors = torch.from_numpy(np.stack([vector_of(*one) for one in who]))
        vectors = (vectors + self.rounding * len(who)).reshape(*video.shape[:2], DIM)
        return VideoFeatures(vectors, vectors, vectors.mean(dim=1))

    def encode_text(self, texts: list[str]) -> TextFeatures:
        vectors = torch.ones(len(texts), DIM)
        return TextFeatures(vectors[:, None], torch.ones(len(texts), 1, dtype=torch.int64), vectors)

    def unknown_words(self, text: str) -> list[str]:
        return []


def write(path: Path, video: int, shown: list[int], times: list[int] | None = None) -> Path:
    """Write frames of a video, 5 a second, or at given fifths of a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "ultrafast"})
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for place, number in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture(video, number), "rgb24")
            frame.pts = place if times is None else times[place]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown_in(start: float, end: float, num_frames: int, step: float) -> list[float]:
    """Return the times at which a segment is looked at, by trying every time of the grid."""
    grid = [(k + 0.5) * step for k in range(math.ceil(end / step) + 1)]
    inside = [time for time in grid if start - 1e-6 <= time < end - 1e-6]
    middles = [start + (k + 0.5) * (end - start) / num_frames for k in range(num_frames)]
    if not inside:
        return [(start + end) / 2] * num_frames
    return [min(inside, key=lambda time, at=at: (round(abs(time - at), 6), time)) for at in middles]


def rows(index: VideoIndex) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return bounds (segments, 2) and vectors (segments, 6) float16 by file name."""
    shot, vectors = index.refresh(), index.vectors()
    found = {}
    for place, video in enumerate(shot.videos):
        mine = np.flatnonzero(shot.row_video == place)
        found[Path(video.path.decode()).name] = (shot.row_bounds[mine], vectors.gather(mine))
    return found


def build(folder: Path, videos: Path, model: Tower, batch_size: int = 3, **settings) -> VideoIndex:
    index = VideoIndex.create(folder, model, **settings)
    model.seen.clear()
    index.add([videos], model=model, batch_size=batch_size)
    return index


@pytest.fixture(scope="module")
def lengths() -> dict[int, int]:
    """Frames of each video: one, less than a step, a segment, a little more, off the grid, long."""
    return {1: 1, 2: 3, 3: 40, 4: 42, 5: 107, 6: 5 * 90, 7: 16}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, lengths) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    for video, count in lengths.items():
        write(folder / f"{video}.mp4", video, list(range(count)))
    return folder


@pytest.mark.parametrize(
    ("segment_s", "stride_s", "num_frames", "step"),
    [
        (8, 4, 8, 1.0),
        (8, 8, 8, 1.0),
        (8, 3, 8, 1.0),
        (10, 4, 8, 1.0),  # the stride would be no multiple of 1.25 s
        (7.3, 2.9, 5, 2.9 / 2),
        (8, 0.5, 4, 0.5),  # more often than frames are wanted
        (100, 60, 2, 30.0),  # some videos end before the grid's first time
    ],
)
def test_each_frame_is_encoded_once_and_segments_are_their_means(
    videos, lengths, tmp_path, segment_s, stride_s, num_frames, step
) -> None:
    model = Tower(num_frames)
    index = build(tmp_path / "i", videos, model, segment_s=segment_s, stride_s=stride_s)
    assert index.manifest.grid_step_s == pytest.approx(step)
    expected, num_wanted = set(), 0
    for name, (bounds, vectors) in rows(index).items():
        video = int(name[0])
        for (start, end), vector in zip(bounds.tolist(), vectors, strict=True):
            times = shown_in(start, end, num_frames, step)
            frames = [min(int(time * FPS + 1e-6), lengths[video] - 1) for time in times]
            num_wanted += num_frames
            expected |= {(video, frame) for frame in frames}
            mean = np.mean([vector_of(video, frame) for frame in frames], axis=0, dtype=np.float64)
            np.testing.assert_allclose(vector, mean, atol=1e-3)  # float16 of numbers below 1
    assert set(model.seen) == expected and set(model.seen.values()) == {1}
    # what segments of their own would have cost; equal only where nothing overlaps
    assert len(expected) < num_wanted or stride_s == segment_s
    assert max(model.batches) <= 3 * num_frames
    assert len(index.snapshot.videos) == len(lengths) and index.verify() == []


def test_half_the_frames_at_the_usual_settings(tmp_path) -> None:
    write(tmp_path / "v" / "1.mp4", 1, list(range(5 * 240)))
    model = Tower()
    index = build(tmp_path / "i", tmp_path / "v", model)
    assert (index.snapshot.generation.num_segments, model.seen.total()) == (59, 240)
    assert index.info()["grid_step_s"] == 1.0


def test_a_picture_that_stands_is_encoded_once_and_counts_by_its_time(tmp_path) -> None:
    # frames 0 to 9 in two seconds, frame 10 for 24, frames 11 to 20 in two seconds
    times = [*range(10), 10, *range(130, 140)]
    write(tmp_path / "v" / "1.mp4", 1, list(range(21)), times)
    model = Tower()
    index = build(tmp_path / "i", tmp_path / "v", model)
    assert set(model.seen.values()) == {1} and (1, 10) in model.seen
    ((bounds, vectors),) = rows(index).values()
    for (start, end), vector in zip(bounds.tolist(), vectors, strict=True):
        frames = [
            int(np.searchsorted(times, time * FPS + 1e-6, side="right")) - 1
            for time in shown_in(start, end, 8, 1.0)
        ]
        mean = np.mean([vector_of(1, frame) for frame in frames], axis=0)
        np.testing.assert_allclose(vector, mean, atol=1e-3)
    inside = [place for place, (start, end) in enumerate(bounds) if start >= 3 and end <= 26]
    assert len(inside) == 4 and all((vectors[place] == vectors[inside[0]]).all() for place in inside)


def test_no_frame_of_another_shot_comes_in(tmp_path, clip, colours, make_encoder) -> None:
    class Colours(make_encoder):
        kind = "frames"

    # steps of 4 s: the grid's times 2, 6, 10 leave two of the shots without any
    scenes = [(colours.red, 1.5), (colours.green, 5), (colours.blue, 2), (colours.yellow, 5)]
    clip(tmp_path / "v.mp4", scenes)
    model = Colours(num_frames=8, capabilities=["search"])
    index = VideoIndex.create(tmp_path / "i", model, segmentation="shots", segment_s=32, stride_s=16)
    assert index.manifest.grid_step_s == 4
    model.num_clips = 0
    index.add([tmp_path / "v.mp4"], model=model)
    ((bounds, vectors),) = rows(index).values()
    assert bounds[:, 0] == pytest.approx([0, 1.5, 6.5, 8.5], abs=0.3)
    for (colour, _), vector in zip(scenes, vectors, strict=True):
        np.testing.assert_allclose(vector * 255, colour, atol=8)
    assert model.num_clips == 5  # one for each of the short ones and the green one's 2 and 6; and 10


def fail_at(monkeypatch, file: int, number: int) -> None:
    """Let decoding fail in the middle of a file."""
    decode = run.decode_files

    def decode_some(paths, settings):
        is_lost = False
        for event in decode(paths, settings):
            if event.file == file and isinstance(event, DecodedSegment) and event.number == number:
                is_lost = True
                yield Failed(file=file, reason="decoder_crashed", detail=f"{paths[file]}: gone")
            elif event.file != file or not is_lost:
                yield event

    monkeypatch.setattr(run, "decode_files", decode_some)


def test_a_file_that_breaks_in_the_middle_spoils_no_other(videos, tmp_path, monkeypatch) -> None:
    whole = rows(build(tmp_path / "a", videos, Tower()))
    fail_at(monkeypatch, file=4, number=2)
    broken = VideoIndex.create(tmp_path / "b", model := Tower())
    report = broken.add([videos], model=model, batch_size=2)
    assert [Path(item.path.decode()).name for item in report.rejected] == ["5.mp4"]
    found = rows(broken)
    assert set(found) == set(whole) - {"5.mp4"}
    for name, (_, vectors) in found.items():
        assert (vectors == whole[name][1]).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_resumed_build_equals_an_unbroken_one(videos, tmp_path, monkeypatch, batch_size) -> None:
    monkeypatch.setattr(run, "PART_SEGMENTS", 4)
    rounding = 0.01  # for each frame of a batch: other batches would show
    whole = rows(build(tmp_path / "a", videos, Tower(rounding=rounding), batch_size))
    index = VideoIndex.create(tmp_path / "b", Tower())
    num_kept = []
    for patience in range(1, 100):
        model = Tower(rounding=rounding)
        encode, left = model.encode_video, iter(range(patience // 2))

        def encode_some(video, encode=encode, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return encode(video)

        model.encode_video = encode_some
        try:
            index.add([videos], model=model, batch_size=batch_size)
        except KeyboardInterrupt:
            num_kept.append(len(index.refresh().videos))
            continue
        break
    assert len(set(num_kept)) > 2  # it was broken off at several places
    found = rows(index)
    assert set(found) == set(whole)
    for name, (bounds, vectors) in found.items():
        assert (bounds == whole[name][0]).all() and (vectors == whole[name][1]).all(), name


def test_an_index_of_before_keeps_its_own_frames(videos, tmp_path) -> None:
    model = Tower()
    new = VideoIndex.create(tmp_path / "new", model)
    file = tmp_path / "new" / "manifest.json"
    values = json.loads(file.read_bytes())
    assert values.pop("grid_step_s") == 1.0
    old = VideoIndex.create_for(tmp_path / "old", build_config(Manifest, values))
    assert old.manifest.grid_step_s is None and old.info()["grid_step_s"] is None
    model.seen.clear()
    old.add([videos / "6.mp4"], model=model)
    assert model.seen.total() == 8 * old.refresh().generation.num_segments  # each segment its own
    assert set(model.seen.values()) >= {1, 2}
    new.add([videos / "1.mp4"], model=model)
    with pytest.raises(InvalidInput, match=r"differ in grid of frames.*vlm index build PATH"):
        merge([old.folder, new.folder], tmp_path / "both")


def test_only_models_that_see_frames_alone_share_them(make_encoder) -> None:
    tower, whole = Tower(), make_encoder()
    layout = choose_layout(tower, None, 4.0)
    assert choose_grid(tower, layout, 8.0, 4.0) == 1.0
    assert choose_grid(whole, choose_layout(whole, None, 4.0), 8.0, 4.0) is None
    assert choose_grid(whole, choose_layout(whole, "none", 4.0), 8.0, 4.0) is None
    tokens = FeatureLayout(dim=6, store_tokens="full", token_pool=1, num_tokens=8, token_dim=6)
    assert choose_grid(tower, tokens, 8.0, 4.0) is None


def test_the_dry_run_counts_frames_once(videos, tmp_path) -> None:
    model = Tower()
    index = build(tmp_path / "i", videos, model)
    num_built = model.seen.total()
    settings = DecodeSettings(preprocessing=model.preprocessing, grid_step_s=1.0)
    layout = choose_layout(model, None, 4.0)
    files = sorted(videos.iterdir())
    shared = estimate_build(files, model, layout, settings, batch_size=3, budget_s=20)
    assert shared.cost.num_frames == num_built
    assert shared.cost.num_segments == index.snapshot.generation.num_segments
    assert shared.cost.hours == pytest.approx(num_built / shared.frames_per_s / 3600)
    ways = {cost.flags: cost for cost in shared.cheaper}
    # half as many segments show the same frames, so they cost the same time and half the disk
    apart = ways["--segment-seconds 8 --stride-seconds 8"]
    assert apart.num_frames == num_built and apart.num_segments < shared.cost.num_segments
    assert ways["--segment-seconds 16 --stride-seconds 16"].hours < 0.6 * apart.hours
    own = estimate_build(
        files, model, layout, DecodeSettings(preprocessing=model.preprocessing), batch_size=3, budget_s=20
    )
    assert own.cost.num_frames == 8 * own.cost.num_segments > 1.5 * num_built


def test_hours_of_video_hold_no_more_than_a_few_vectors() -> None:
    class Wide(Tower):
        def encode_video(self, video: torch.Tensor) -> VideoFeatures:
            vectors = torch.ones(len(video), 1, 4096)
            return VideoFeatures(vectors, vectors, vectors[:, 0])

    layout = FeatureLayout(dim=4096, store_tokens="none", token_pool=1, num_tokens=0, token_dim=0)
    batches = make_batches(Wide(), layout, 1.0, 4)
    frame = np.zeros((8, 3, 2, 2), np.float32)
    tracemalloc.start()
    for number in range(9000):  # ten hours, 36,004 frames: their vectors would be 590 MB
        new = frame if number == 0 else frame[:4]
        hashes, shown = np.zeros(8, np.uint64), 4 * number + np.arange(8)
        batches.add(number, DecodedSegment(file=0, number=number, video=new, hashes=hashes, shown=shown))
        if batches.is_full:
            encoded = batches.encode()
            assert encoded is not None and encoded.num_frames <= 36
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_clip_finds_its_video(videos, tmp_path) -> None:
    model = Tower()
    index = build(tmp_path / "i", videos, model)
    (hit,) = Searcher(index, model).search(videos / "3.mp4", top_k=1)
    # eight seconds of 40 frames: the same eight, as the query's own and as those of the grid
    mean = np.mean([vector_of(3, frame) for frame in range(2, 40, 5)], axis=0)
    assert Path(hit.path).name == "3.mp4" and hit.score == pytest.approx(float(mean @ mean), abs=1e-3)


@pytest.mark.parametrize("way", ["shared", "own"])
def test_copies_are_looked_for_by_the_times_of_the_grid(videos, tmp_path, monkeypatch, way) -> None:
    model = Tower()
    index = VideoIndex.create(tmp_path / "i", model)
    if way == "own":
        index = VideoIndex.create_for(tmp_path / "w", replace(index.manifest, grid_step_s=None))
    for name in ("a", "b"):
        shutil.copy(videos / "5.mp4", tmp_path / f"{name}.mp4")
    index.add([tmp_path / "a.mp4", tmp_path / "b.mp4"], model=model)
    found, of_segments = [], grouping.Frames.of_segments

    def remember(*arguments):
        found.append(of_segments(*arguments))
        return found[-1]

    monkeypatch.setattr(grouping.Frames, "of_segments", remember)
    Searcher(index, model).search("any")
    # 21.4 s: the last segment begins at 13.4, and shares all its frames if there is a grid
    assert [len(frames.times_s) for frames in found] == [21 if way == "shared" else 28] * 2
