"""Ceilings of partial knowledge: what no bag of frames, and no reader of single frames, can pass."""

import numpy as np
import pytest

from vlm.world import gallery
from vlm.world.oracles import ORACLES, ceilings, expected_recall, oracle_scores


@pytest.fixture(scope="module")
def table(world_now):
    return world_now["ceilings"]


def test_a_bag_of_frames_gets_exactly_half(table):
    assert table["frame set"]["recall@1"] == 0.5
    assert table["frame set"]["pair recall@1"] == 1.0


def test_what_single_frames_show_gets_about_forty_percent(table):
    assert 0.35 < table["static"]["recall@1"] < 0.45
    assert table["digits"]["recall@1"] <= table["static"]["recall@1"]


def test_full_knowledge_suffices_and_captions_are_specific(table):
    assert table["all"]["recall@1"] == table["all"]["pair recall@1"] == 1.0
    assert table["own clip"]["pair recall@1"] > 0.99


def test_more_knowledge_never_hurts_much(table):
    order = ["colours", "colours and motions, unbound", "bound pairs", "order", "all"]
    values = [table[name]["recall@1"] for name in order]
    assert values == sorted(values)


def test_words_alone_cannot_tell_twins_that_only_reorder():
    scenes = list(gallery("test", 3, 60, twins=True))
    assert set(ORACLES) | {"frame set", "own clip"} == set(ceilings(scenes))
    scores = oracle_scores("frame set", scenes)
    assert (np.diag(scores)[::2] == np.diag(scores[:, [i ^ 1 for i in range(120)]])[::2]).all()


def test_expected_recall_against_simulation():
    rng = np.random.default_rng(0)
    scores, positives = rng.integers(0, 3, (20, 12)), rng.random((20, 12)) < 0.2
    positives[:, 0] = True
    for k in (1, 5):
        hits = []
        for _ in range(3000):
            ranking = np.argsort(-(scores + rng.random(scores.shape) / 2), axis=1)[:, :k]
            hits.append(np.take_along_axis(positives, ranking, 1).any(1).mean())
        assert abs(np.mean(hits) - expected_recall(scores, positives, k)) < 0.005
