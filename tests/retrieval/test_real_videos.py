"""Every clip of the optional collection, of many codecs, odd and broken, is indexed or rejected."""

from __future__ import annotations

import csv
import os
import time

import pytest

from vlm.retrieval import Searcher, VideoIndex

# frames decode in principle, but the container is not among those that are opened
NOT_OPENED = {"derived/webp_animated.webp"}


@pytest.mark.slow
def test_none_is_silently_missing(shared, tmp_path, make_encoder) -> None:
    folder = shared / "videos"
    if not folder.is_dir():
        pytest.skip("no videos")
    model = make_encoder()
    index = VideoIndex.create(tmp_path / "i", model)
    began = time.monotonic()
    report = index.add([folder], model=model, num_workers=2)
    assert time.monotonic() - began < 90
    with (folder / "manifest.csv").open(newline="") as stream:
        facts = {row["file"]: row for row in csv.DictReader(stream)}
    videos = {os.path.relpath(os.fsdecode(v.path), folder): v for v in index.snapshot.videos}
    rejected = {os.path.relpath(os.fsdecode(r.path), folder): r for r in report.rejected}
    assert set(videos) | set(rejected) == set(facts)
    assert not set(videos) & set(rejected)
    decodable = {name for name, row in facts.items() if row["frames_decoded"] not in ("", "0")}
    assert set(videos) == decodable - NOT_OPENED
    for name, rejection in rejected.items():
        assert rejection.reason.isidentifier() and os.path.basename(name) in rejection.detail
    for name, video in videos.items():
        row = facts[name]
        turned = row["rotation"] in ("90", "-90", "270", "-270")
        size = (int(row["height"]), int(row["width"])) if turned else (int(row["width"]), int(row["height"]))
        if "change" not in name:
            assert (video.width, video.height) == size, name
        assert 0 < video.duration_s < 400
    assert index.verify() == []
    hits = Searcher(index, model).search("green", top_k=500, group=False)
    assert len(hits) == len(videos)
    for hit in hits:
        video = videos[os.path.relpath(hit.path, folder)]
        assert 0 <= hit.start_s < hit.end_s <= video.duration_s + 1e-6
    again = index.add([folder], model=model, num_workers=2)
    assert (again.num_added, again.num_unchanged, len(again.rejected)) == (0, len(videos), len(rejected))
