"""Twin measures by hand, by every tie order, and the ceiling of models that ignore order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.metrics import Positives, pair_positives, rank_scores, twin_scores


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_every_tie_order(values):
    """Each order of the four scores that their ties allow is a model without ties; the mean is ours."""
    outcomes = []
    for order in itertools.permutations(range(4)):
        if all(values[a] >= values[b] for a, b in itertools.pairwise(order)):
            rank = [-order.index(i) for i in range(4)]
            own, clip, text, second = rank  # (0,0), (0,1): other clip, (1,0): other text, (1,1)
            by_text, by_clip = own > text and second > clip, own > clip and second > text
            outcomes.append([by_text, by_clip, by_text and by_clip, ((own > clip) + (second > text)) / 2])
    found = twin_scores(np.asarray(values, np.float32).reshape(1, 2, 2))
    ours = [found.text[0], found.video[0], found.group[0], found.direction[0]]
    assert ours == pytest.approx(np.mean(outcomes, axis=0), abs=1e-12)


def test_chance_of_a_collapsed_and_of_a_random_model():
    flat = twin_scores(np.zeros((3, 2, 2)))
    assert flat.text.tolist() == flat.video.tolist() == [0.25] * 3
    assert flat.group == pytest.approx([1 / 6] * 3)
    assert flat.direction.tolist() == [0.5] * 3
    random = twin_scores(np.random.default_rng(0).standard_normal((20000, 2, 2)))
    means = [np.mean(part) for part in (random.text, random.video, random.group, random.direction)]
    assert means == pytest.approx([0.25, 0.25, 1 / 6, 0.5], abs=0.015)


def test_by_hand():
    right = [[5.0, 1.0], [2.0, 6.0]]
    swapped = [[1.0, 5.0], [6.0, 2.0]]
    text_only = [[5.0, 9.0], [4.0, 10.0]]  # each clip prefers its caption; caption 0 prefers the other clip
    found = twin_scores(np.array([right, swapped, text_only]))
    assert found.text.tolist() == [1, 0, 1]
    assert found.video.tolist() == [1, 0, 0]
    assert found.group.tolist() == [1, 0, 0]
    assert found.direction.tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_a_bag_of_frames_cannot_pass_half(seed):
    """A clip and its twin get equal scores; however good the bag, R@1 is half of pair R@1."""
    random = np.random.default_rng(seed)
    scores = np.repeat(random.standard_normal((40, 20)) + 3 * np.repeat(np.eye(20), 2, axis=0), 2, axis=1)
    positives = Positives.from_lists([[i] for i in range(40)], 40)
    twin_of = np.arange(40) ^ 1
    right = rank_scores(scores, positives).recall(1)
    pair = rank_scores(scores, pair_positives(positives, twin_of)).recall(1)
    assert right == pytest.approx(pair / 2)
    assert right.mean() <= 0.5
    found = twin_scores(scores.reshape(20, 2, 20, 2)[np.arange(20), :, np.arange(20)])
    assert found.direction.tolist() == [0.5] * 20
    assert found.text.max() == 0.0  # of two equal clips one must take the wrong caption


def test_pair_positives_join_twins_of_all_positives():
    positives = Positives.from_lists([[0], [2, 4], [5]], 6)
    joined = pair_positives(positives, np.array([1, 0, 3, 2, -1, -1]))
    assert [joined[i].tolist() for i in range(3)] == [[0, 1], [2, 3, 4], [5]]


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="2 captions, 2 clips"):
        twin_scores(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="1 of 8 scores are not finite"):
        twin_scores(np.array([np.nan, *range(7)]).reshape(2, 2, 2))
