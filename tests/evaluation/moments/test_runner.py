"""Cards on moments from models and files whose answers are known beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.errors import CapabilityError, DataError, InvalidInput, UsageError
from vlm.evaluation import compare_cards, load_protocol, render_card, render_comparison
from vlm.evaluation.card import read_card, write_card
from vlm.evaluation.moments.baselines import blind_highlights, blind_moments
from vlm.evaluation.moments.data import MomentSet
from vlm.evaluation.moments.measures import by_length
from vlm.evaluation.moments.predictions import FoundMoments
from vlm.evaluation.moments.proposals import cut_stretches, propose, rate_clips
from vlm.evaluation.moments.runner import evaluate_found, evaluate_search, find_moments
from vlm.evaluation.moments.settings import MomentSettings, Proposals
from vlm.types import Preprocessing, TextFeatures, VideoFeatures

PROPOSALS = Proposals(segment_s=(4.0,), stride=0.5, suppress_iou=0.2)
PROTOCOL = replace(
    load_protocol("world-long"), expected=None, moments=MomentSettings(max_windows=5, proposals=PROPOSALS)
)


def moment_set(truths, videos, durations, ratings=None):
    names = [f"v{place}" for place in range(len(durations))]
    return MomentSet(
        query_ids=tuple(f"q{place}" for place in range(len(truths))),
        queries=tuple(f"at {truth[0][0]}" for truth in truths),
        query_video=np.asarray(videos, np.int64),
        truths=tuple(np.asarray(truth, np.float64) for truth in truths),
        ratings=ratings or (None,) * len(truths),
        video_ids=tuple(names),
        paths=tuple(map(Path, names)),
        durations_s=tuple(durations),
        annotations_sha256="0",
        annotation_files={},
    )


class Clock:
    """Sees when a stretch begins, and scores it by how far that is from the number in the text."""

    name, kind, domain, fingerprint = "clock", "video-text", "digit-world", "0"
    capabilities = frozenset({"search"})
    preprocessing = Preprocessing(num_frames=1, image_size=2)
    device = torch.device("cpu")

    def encode_video(self, video):
        start = video[:, 0, 0, 0, 0]
        rows = torch.stack([start, start**2, torch.ones_like(start)], dim=1)
        return VideoFeatures(rows[:, None], rows[:, None], rows)

    def encode_text(self, texts):
        wanted = torch.tensor([float(text.split()[1]) for text in texts])
        rows = torch.stack([2 * wanted, torch.full_like(wanted, -1), -(wanted**2)], dim=1)
        return TextFeatures(rows[:, None], torch.ones(len(texts), 1, dtype=torch.int64), rows)

    def unknown_words(self, text):
        return []


DURATIONS = {"v0": 20.0, "v1": 9.0}


def load(path, preprocessing, proposals):
    if path.name not in DURATIONS:
        raise DataError(f"{path}: no such file", "missing")
    for start, end in cut_stretches(DURATIONS[path.name], proposals):
        yield (start, end), torch.full((1, 3, 2, 2), start)


def test_stretches_of_several_lengths_cover_a_video_once():
    found = cut_stretches(10.0, Proposals(segment_s=(4.0, 16.0, 32.0), stride=0.5))
    assert found == [(0.0, 4.0), (0.0, 10.0), (2.0, 6.0), (4.0, 8.0), (6.0, 10.0)]


def test_worse_stretches_that_overlap_are_left_out():
    stretches = np.asarray([[0, 4], [2, 6], [4, 8], [6, 10]], np.float64)
    scores = np.asarray([0.1, 0.9, 0.8, 0.9])
    # [4, 8] shares 2 of 6 s with both better ones, which share nothing
    assert propose(stretches, scores, 9, 0.3).tolist() == [[2, 6, 0.9], [6, 10, 0.9]]
    assert propose(stretches, scores, 9, 0.34).tolist() == [
        [2, 6, 0.9],
        [6, 10, 0.9],
        [4, 8, 0.8],
        [0, 4, 0.1],
    ]
    assert propose(stretches, scores, 1, 1.0).tolist() == [[2, 6, 0.9]]


def test_clips_have_the_scores_of_the_stretches_around_them():
    stretches = np.asarray([[0, 4], [2, 6]], np.float64)
    found = rate_clips(stretches, np.asarray([1.0, 3.0]), 4, 2.0)
    assert found.tolist() == [1, 2, 3, 3]  # the last lies beyond the end


def test_a_model_that_knows_the_time():
    ratings = np.zeros((10, 2))
    ratings[3:5] = 4
    data = moment_set([[[6, 10]], [[1, 5]], [[4, 8]]], [0, 0, 1], [None, None], (ratings, None, None))
    search = find_moments(Clock(), data, PROTOCOL, load, batch_size=3)
    # of the stretches at 0, 2, 4, ... the nearest; [0, 4] overlaps [1, 5] by 3 of 5 seconds
    assert [rows[0, :2].tolist() for rows in search.found.windows] == [[6, 10], [0, 4], [4, 8]]
    assert search.data.durations_s == (20, 9) and search.num_stretches == 9 + 4
    card = evaluate_search(search, Clock(), PROTOCOL, source="here")
    block = card["results"]["moments"]["itc"]
    assert block["recall@1@0.7"]["value"] == pytest.approx(2 / 3) and block["recall@1@0.5"]["value"] == 1
    assert block["miou"]["value"] == pytest.approx((1 + 0.6 + 1) / 3)
    assert block["map@0.75"]["value"] == pytest.approx(2 / 3)
    assert block["map"]["value"] == pytest.approx((1 + 0.3 + 1) / 3)
    assert card["results"]["highlights"]["itc"]["fair"]["hit@1"]["value"] == 1
    protocol = card["protocol"]
    assert (protocol["num_queries"], protocol["num_items"], protocol["frames"]) == (3, 2, 1)
    assert protocol["proposals"]["segment_s"] == [4.0] and card["model"]["source"] == "here"


def test_unreadable_videos_stop_the_measurement_or_are_listed():
    data = moment_set([[[6, 10]], [[1, 5]]], [1, 0], [None, None])
    data = replace(data, paths=(Path("gone"), Path("v0")))
    with pytest.raises(
        InvalidInput, match=r"1 of 2 videos cannot be read \(v0: missing: gone: no such file\)"
    ):
        find_moments(Clock(), data, PROTOCOL, load)
    search = find_moments(Clock(), data, PROTOCOL, load, allow_missing=1)
    card = evaluate_search(search, Clock(), PROTOCOL)
    assert card["data"]["missing"] == [{"clip": "v0", "reason": "missing: gone: no such file"}]
    assert (card["protocol"]["num_queries"], card["protocol"]["num_items"]) == (1, 1)
    assert "1 clips missing" in render_card(card)


def test_models_that_cannot_are_refused(monkeypatch):
    data = moment_set([[[6, 10]]], [0], [None])
    monkeypatch.setattr(Clock, "capabilities", frozenset({"classify"}))
    with pytest.raises(CapabilityError, match="cannot embed videos and texts, which finding moments needs"):
        find_moments(Clock(), data, PROTOCOL, load)
    monkeypatch.undo()

    class Broken(Clock):
        def encode_video(self, video):
            features = super().encode_video(video)
            return features._replace(embedding=features.embedding / (features.embedding[:, :1] - 4))

    with pytest.raises(InvalidInput, match="v0: the model's embedding of 4 to 8 s is not finite"):
        find_moments(Broken(), data, PROTOCOL, load)


def found_in(windows, saliency=None):
    rows = tuple(np.asarray(entry, np.float64).reshape(-1, 3) for entry in windows)
    return FoundMoments(windows=rows, saliency=saliency or (None,) * len(rows))


def test_lengths_of_true_windows_are_split_as_published():
    """Up to 10 s short, up to 30 s middle; a query counts in each group, with the windows of that group."""
    data = moment_set([[[0, 10], [20, 60]], [[0, 30]], [[5, 5]]], [0, 1, 0], [90.0, 90.0])
    table = by_length(found_in([[[20, 60, 1]], [[0, 30, 1]], []]).windows, data, PROTOCOL)
    assert {name: block["num_queries"] for name, block in table.items()} == {
        "short": 1,
        "middle": 1,
        "long": 1,
    }
    assert (table["short"]["map"]["value"], table["long"]["map"]["value"]) == (0, 1)
    assert table["middle"]["recall@1@0.7"]["value"] == 1


def test_guessing_the_whole_video_and_at_random():
    """Both ends drawn at random overlap all of a video by half with a chance of 1/4."""
    data = moment_set([[[0, 10]]] * 600, list(range(600)), [10.0] * 600)
    blind = blind_moments(data, PROTOCOL)
    assert blind["whole video"]["recall@1@0.7"]["value"] == 1
    assert blind["random window"]["recall@1@0.5"]["value"] == pytest.approx(1 / 4, abs=0.03)
    assert blind["random window"]["recall@5@0.5"]["value"] == pytest.approx(1 - 0.75**5, abs=0.03)
    assert blind["random window"]["miou"]["value"] == pytest.approx(1 / 3, abs=0.02)


def test_guessing_another_videos_window_never_takes_the_own():
    data = moment_set([[[0, 5]], [[0, 4]], [[10, 20]]], [0, 0, 1], [10.0, 20.0])
    blind = blind_moments(data, PROTOCOL)["window of another video"]
    assert blind["miou"]["value"] == 0  # the other's half, always
    alike = moment_set([[[0, 5]], [[0, 10]]], [0, 1], [10.0, 20.0])
    assert blind_moments(alike, PROTOCOL)["window of another video"]["map"]["value"] == 1
    assert "window of another video" not in blind_moments(moment_set([[[0, 5]]], [0], [9.0]), PROTOCOL)
    assert blind_moments(moment_set([[[0, 5]]], [0], [None]), PROTOCOL) == {}


def test_scores_alike_for_every_clip():
    ratings = np.asarray([[4.0, 0], [0, 0], [0, 2], [0, 0]])
    blind = blind_highlights(moment_set([[[0, 4]]], [0], [8.0], (ratings,)), PROTOCOL)["every clip alike"]
    assert blind["fair"]["hit@1"]["value"] == 0.5 and blind["fair"]["map"]["value"] == pytest.approx(0.25)
    assert blind["very good"]["map"]["value"] == pytest.approx(0.125)


def test_saliency_must_fit_the_clips():
    ratings = np.full((4, 1), 3.0)
    data = moment_set([[[0, 4]], [[0, 4]]], [0, 0], [8.0], (ratings, None))
    windows = [[[0, 4, 1]], []]

    def card_of(first):
        scores = None if first is None else np.asarray(first, np.float64)
        return evaluate_found(found_in(windows, (scores, np.zeros(1))), data, PROTOCOL, {"name": "m"})

    assert card_of([1, 2, 3, 4])["results"]["highlights"]["given"]["good"]["map"]["value"] == 1
    assert "highlights" in card_of([1, 2, 3])["results"]  # a last clip that was left off
    for wrong, got in (([1, 2], "2"), (None, "none"), ([1] * 6, "6")):
        with pytest.raises(
            InvalidInput, match=f"query 'q0': expected a saliency score for each of 4 .* {got}"
        ):
            card_of(wrong)


def test_cards_of_files_are_written_read_shown_and_compared(tmp_path):
    data = moment_set([[[0, 4]], [[4, 8]], [[2, 6]]], [0, 1, 1], [10.0, 12.0])
    first = evaluate_found(found_in([[[0, 4, 1]], [[0, 4, 1]], []]), data, PROTOCOL, {"name": "first"})
    second = evaluate_found(found_in([[[0, 4, 1]], [[4, 8, 1]], []]), data, PROTOCOL, {"name": "second"})
    write_card(first, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == first
    shown = render_card(first)
    assert "moments: 3 queries, 2 videos; model first" in shown
    assert "window of another video" in shown and "recall@5@0.7" in shown and "middle" in shown
    assert first["data"]["queries_nothing_was_found_for"] == 1
    comparison = compare_cards(first, second)
    entry = comparison["differences"]["moments"]["given"]["recall@1@0.5"]
    assert (entry["first"], entry["second"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert entry["value"] == pytest.approx(1 / 3)
    assert "moments, given" in render_comparison(comparison)
    stricter = replace(PROTOCOL, moments=replace(PROTOCOL.moments, ious=(0.5,)))
    with pytest.raises(InvalidInput, match="different protocols"):
        compare_cards(first, evaluate_found(found_in([[], [], []]), data, stricter, {"name": "x"}))
    search = find_moments(Clock(), replace(data, durations_s=(None, None)), PROTOCOL, load)
    with pytest.raises(InvalidInput, match="different protocols"):
        compare_cards(first, evaluate_search(search, Clock(), PROTOCOL))


def test_without_lengths_there_are_no_baselines():
    data = moment_set([[[0, 4]]], [0], [None])
    card = evaluate_found(found_in([[[0, 4, 1]]]), data, PROTOCOL, {"name": "m"})
    assert "no baselines" in render_card(card)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moments.ious=[0.0]", r"ious and mean_at must be in \(0, 1\]"),
        ("moments.lengths=[30, 10]", "lengths ascending"),
        ("moments.max_windows=3", "max_windows must be at least the largest of recall_at"),
        ("moments.proposals.stride=2", "stride must be in"),
        ("moments.proposals.segment_s=[]", "segment_s must hold positive"),
        ("moments.proposals.suppress_iou=-1", "suppress_iou must be in"),
        ("moments=null", "moments goes with the task"),
    ],
)
def test_impossible_protocols(override, message):
    with pytest.raises(UsageError, match=message):
        load_protocol("world-long", (override,))
