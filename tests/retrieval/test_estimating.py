"""What a build is said to cost, against what it costs; and what is embedded first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vlm.errors import DataError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex
from vlm.retrieval.embedding import choose_layout
from vlm.retrieval.ingest import estimating
from vlm.retrieval.ingest.estimating import estimate_build
from vlm.retrieval.ingest.events import DecodeSettings
from vlm.retrieval.ingest.scanning import scan_paths


@pytest.fixture(scope="module")
def many(tmp_path_factory, clip_writer) -> Path:
    """Forty videos of 2 to 30 s."""
    folder = tmp_path_factory.mktemp("many")
    lengths = np.random.default_rng(4).integers(2, 31, 40).tolist()
    for number, seconds in enumerate(lengths):
        colour = tuple(np.random.default_rng(number).integers(0, 255, 3).tolist())
        clip_writer(folder / f"{number % 4}" / f"{number:02}.mp4", [(colour, seconds)])
    return folder


def estimated(folder: Path, model, budget_s: float, **values):
    settings = DecodeSettings(preprocessing=model.preprocessing, **values)
    layout = choose_layout(model, None, settings.stride_s)
    files = scan_paths([folder], folder / "none").files
    return estimate_build(files, model, layout, settings, batch_size=4, budget_s=budget_s)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The estimate's clock, which runs only while a batch is encoded: no machine's load reaches it."""
    reading = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(estimating, "time", SimpleNamespace(monotonic=lambda: reading.now_s))
    return reading


def test_the_time_is_within_three_tenths_and_the_segments_exact(
    many, make_encoder, tmp_path, monkeypatch, clock
) -> None:
    model = make_encoder()
    encode = model.encode_video

    def slow(video):
        clock.now_s += 0.02 + 0.025 * len(video)
        return encode(video)

    monkeypatch.setattr(model, "encode_video", slow)
    estimate = estimated(many, model, budget_s=3.0)
    assert 8 <= estimate.num_measured < 0.8 * estimate.cost.num_segments
    clock.now_s = 0.0
    index = VideoIndex.create(tmp_path / "i", model)
    report = index.add([many], model=model, batch_size=4)
    assert estimate.cost.hours == pytest.approx(clock.now_s / 3600, rel=0.3)
    assert (estimate.num_files, estimate.num_opened, estimate.num_broken) == (40, 40, 0)
    assert estimate.cost.num_segments == report.num_segments
    assert estimate.video_hours == pytest.approx(index.info()["duration_s"] / 3600, rel=0.01)
    size = sum(path.stat().st_size for path in index.folder.rglob("*") if path.is_file())
    assert estimate.cost.disk_bytes <= size  # which has the catalogue's fixed pages on top


@pytest.mark.parametrize(("num_workers", "batches"), [(1, 1), (3, None)])
def test_a_lone_decoder_does_not_get_far_ahead_of_what_is_measured(
    num_workers, batches, many, make_encoder, monkeypatch
) -> None:
    used, decode = [], estimating.decode_files

    def watched(files, settings):
        used.append(settings)
        return decode(files, settings)

    monkeypatch.setattr(estimating, "decode_files", watched)
    model = make_encoder()
    estimated(many, model, budget_s=0.2, num_workers=num_workers)
    opening, measuring = used
    segment_bytes = 4 * 3 * model.preprocessing.num_frames * model.preprocessing.image_size**2
    assert opening.only_open and not measuring.only_open
    usual = DecodeSettings(preprocessing=model.preprocessing).ahead_bytes
    assert measuring.ahead_bytes == (usual if batches is None else batches * 4 * segment_bytes)


def test_cheaper_ways_are_cheaper_and_their_flags_are_real(many, make_encoder) -> None:
    from vlm.cli import _parser

    estimate = estimated(many, make_encoder(), budget_s=0.5)
    parser = _parser(["index"])
    counts = [estimate.cost.num_segments]
    for cost in estimate.cheaper:
        words = ["index", "build", "v", "--out", "i", "--model", "m", *cost.flags.split()]
        assert parser.parse_args(words).action == "build"
        assert cost.hours <= estimate.cost.hours and cost.disk_bytes < estimate.cost.disk_bytes
        counts.append(cost.num_segments)
    assert counts == sorted(counts, reverse=True) and len(counts) == 5


def test_broken_files_are_counted_and_only_they_are_no_collection(
    tmp_path, clip, colours, make_encoder
) -> None:
    (tmp_path / "v").mkdir()
    for number in range(3):
        (tmp_path / "v" / f"bad{number}.mp4").write_bytes(b"no video" * 50)
    with pytest.raises(DataError, match="none of the files"):
        estimated(tmp_path / "v", make_encoder(), budget_s=1.0)
    clip(tmp_path / "v" / "good.mp4", [(colours.red, 3)])
    estimate = estimated(tmp_path / "v", make_encoder(), budget_s=1.0)
    assert (estimate.num_broken, estimate.cost.num_segments, estimate.num_measured) == (3, 1, 1)


def test_the_command_prints_it_and_writes_nothing(many, tmp_path, call_vlm) -> None:
    words = ["index", "build", str(many), "--out", str(tmp_path / "i"), "--model", "colours", "--dry-run"]
    code, printed, _ = call_vlm(*words, "--json")
    assert code == 0 and not (tmp_path / "i").exists()
    values = json.loads(printed)
    assert values["num_files"] == 40 and len(values["cheaper"]) == 4
    code, printed, _ = call_vlm(*words)
    assert code == 0 and "as asked:" in printed and "--segment-seconds 8 --stride-seconds 8" in printed


def test_what_comes_first_is_chosen(many, tmp_path) -> None:
    files = scan_paths([many], tmp_path).files
    assert files == sorted(files)
    for age, file in enumerate(files):
        os.utime(file, (1_000_000 + age, 1_000_000 + age))
    assert scan_paths([many], tmp_path, "recent").files == files[::-1]
    chosen = scan_paths([many], tmp_path, str(many / "2")).files
    assert [file.parent.name for file in chosen[:10]] == ["2"] * 10
    assert sorted(chosen) == files and chosen[10:] == [f for f in files if f.parent.name != "2"]
    with pytest.raises(InvalidInput, match="cannot come first"):
        scan_paths([many], tmp_path, str(many / "9"))


def test_what_came_first_can_be_searched_while_the_rest_is_embedded(
    many, tmp_path, make_encoder, monkeypatch
) -> None:
    import importlib

    run = importlib.import_module("vlm.retrieval.ingest.run")
    monkeypatch.setattr(run, "PART_SEGMENTS", 8)
    model, seen = make_encoder(), []
    index = VideoIndex.create(tmp_path / "i", model)
    encode = model.encode_video

    def watch(video):
        reader = VideoIndex.open(tmp_path / "i")
        if reader.snapshot.videos:
            seen.append(
                {Path(hit.path).parent.name for hit in Searcher(reader, model).search("red", top_k=50)}
            )
        return encode(video)

    monkeypatch.setattr(model, "encode_video", watch)
    index.add([many], model=model, first=str(many / "3"))
    assert seen[0] == {"3"} and len(seen[-1]) > 1
