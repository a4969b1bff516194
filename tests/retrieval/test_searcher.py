from __future__ import annotations

import numpy as np
import pytest

from vlm.errors import CapabilityError, DataError, InvalidInput
from vlm.retrieval import Searcher, VideoIndex


@pytest.fixture(params=["exact", "faiss"])
def searcher(request, built, make_encoder):
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return Searcher(VideoIndex.open(built), make_encoder(), backend=request.param)


@pytest.mark.parametrize(("word", "name", "start_s", "end_s"), [
    ("red", "rgb.mp4", 0, 8), ("green", "rgb.mp4", 8, 16), ("blue", "rgb.mp4", 16, 24),
    ("yellow", "yellow.mp4", 8, 16),
])
def test_the_right_moment_is_found(searcher, word, name, start_s, end_s) -> None:
    hits = searcher.search(word)
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert len({hit.video_id for hit in hits}) == 3
    assert hits[0].path.endswith(name)
    assert (hits[0].start_s, hits[0].end_s) == pytest.approx((start_s, end_s))
    assert {hit.score_kind for hit in hits} == {"itc"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.warning is None for hit in hits)
