"""What is done quickly gives what the plain way gives: rows gathered, numbers widened, copies looked for."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.evaluation.tradeoff.stored import store
from vlm.evaluation.tradeoff.synthetic import SyntheticVectors
from vlm.retrieval.backends.exact import widened
from vlm.retrieval.duplicates import grouping
from vlm.retrieval.duplicates.alignment import Overlap
from vlm.retrieval.duplicates.hashing import NO_HASH
from vlm.retrieval.manifest import Snapshot
from vlm.retrieval.strength.calibration import Calibration


def test_every_float16_number_is_widened_exactly():
    every = np.arange(65_536, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    np.testing.assert_array_equal(widened(every), every.astype(np.float32))
    mapped = every.copy()
    mapped.flags.writeable = False
    np.testing.assert_array_equal(widened(mapped), every.astype(np.float32))
    # more than one piece, with a rest
    long = np.random.default_rng(0).normal(size=(333, 1001)).astype(np.float16)
    np.testing.assert_array_equal(widened(long), long.astype(np.float32))
    assert widened(np.zeros((0, 5), np.float16)).shape == (0, 5)


@pytest.mark.parametrize("order", ["ascending", "random", "one part", "repeated", "none"])
def test_rows_are_gathered_as_if_they_lay_in_one_array(tmp_path, order):
    vectors = SyntheticVectors(16)
    log = store(tmp_path / "i", vectors, 2345).vectors()
    whole = np.concatenate(list(vectors.blocks(2345))).astype(np.float16)
    random = np.random.default_rng(1)
    rows = {
        "ascending": np.sort(random.choice(2345, 700, replace=False)),
        "random": random.integers(0, 2345, 700),
        "one part": np.arange(510, 600),
        "repeated": np.array([7, 7, 2344, 2344, 0, 0, 7]),
        "none": np.zeros(0, np.int64),
    }[order]
    np.testing.assert_array_equal(log.gather(rows), whole[rows])


def slow_groups(hashes, overlaps):
    """Group by comparing every pair, bit by bit."""

    def may_be(first, second):
        def like(one, other):
            return one != NO_HASH and other != NO_HASH and (int(one) ^ int(other)).bit_count() <= 14

        return sum(any(like(one, other) for other in hashes[second]) for one in hashes[first]) >= 2

    groups = []
    for place in range(len(hashes)):
        for group in groups:
            if may_be(group[0], place) and overlaps(group[0], place):
                group[1].append(place)
                break
        else:
            groups.append((place, []))
    return groups


def test_groups_are_those_of_every_pair(monkeypatch):
    random = np.random.default_rng(2)
    hashes = random.integers(1, 2**64, (40, 5), np.uint64)
    for place in range(0, 36, 3):  # some share two frames, with some bits changed, some only one
        hashes[place + 1, 1:3] = hashes[place, 2:4] ^ np.uint64(0b1011 << int(random.integers(50)))
        hashes[place + 2, 4] = hashes[place, 0]
    hashes[5], hashes[20, :4], hashes[21, :4] = NO_HASH, NO_HASH, NO_HASH
    hashes[30] = hashes[31] = hashes[32]

    def overlaps(leader, place):
        return (leader + place) % 4 != 3

    def find(leader, other, start_s, end_s):
        return Overlap(0, 1, 0, 1) if overlaps(leader, other) else None

    class Numbers:
        of_segments = staticmethod(lambda bounds, hashes, grid_step_s: int(bounds[0, 0]))

    monkeypatch.setattr(grouping, "find_overlap", find)
    monkeypatch.setattr(grouping, "Frames", Numbers)
    places = np.arange(40)
    snapshot = Snapshot(
        generation=None, videos=[], files=(), parts=[], row_video=places, row_hashes=hashes,
        row_bounds=np.stack([places, places + 1], axis=1).astype(float),
    )  # fmt: skip
    found = [(g.place, [place for place, _ in g.copies]) for g in grouping.group_alike(snapshot, places)]
    expected = slow_groups(hashes, overlaps)
    assert found == expected
    assert 3 < sum(len(copies) for _, copies in expected) < 30
    for most in range(1, len(expected) + 2):  # as few as are wanted, with all their copies
        some = grouping.group_alike(snapshot, places, most=most)
        assert [(g.place, [place for place, _ in g.copies]) for g in some] == expected[:most]
    one_frame = Snapshot(
        generation=None, videos=[], files=(), parts=[], row_video=places, row_hashes=hashes[:, :1],
        row_bounds=snapshot.row_bounds,
    )  # fmt: skip
    assert len(grouping.group_alike(one_frame, places)) == 40
    assert grouping.group_alike(snapshot, []) == []


def test_grades_are_those_of_the_quantiles():
    random = np.random.default_rng(3)
    bank, again = random.normal(size=(2, 120))
    made = Calibration(bank="b", num_rows=9, scores=tuple(bank), reranked=tuple(again))
    scores = random.normal(size=200) * 2
    for own, grades in ((bank, made.grade(scores)), (again, made.grade_reranked(scores))):
        weak, strong = np.quantile(own, 0.5), np.quantile(own, 0.9)
        names = ["strong" if s > strong else "weak" if s > weak else "unrelated" for s in scores]
        assert grades == names and len(set(names)) == 3
    assert made.grade(scores) != made.grade_reranked(scores)
