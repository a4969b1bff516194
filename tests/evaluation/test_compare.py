"""Paired differences on the same queries, or a refusal that names what differs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from vlm.errors import InvalidInput
from vlm.evaluation import MatrixFiles, compare_cards, evaluate_scores, render_comparison
from vlm.evaluation.compare import differing_fields
from vlm.evaluation.protocol import BootstrapSettings


@pytest.fixture
def card_of(tmp_path):
    def make(scores, name="scores", kind="itc", positives=None):
        np.save(tmp_path / f"{name}.npy", scores)
        right = positives or [[i] for i in range(len(scores))]
        (tmp_path / "positives.json").write_text(json.dumps(right))
        files = tmp_path / f"{name}.npy", tmp_path / "positives.json"
        return evaluate_scores(*files, MatrixFiles(kind=kind), bootstrap=BootstrapSettings(resamples=300))

    return make


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((200, 200)).astype(np.float32)


def test_difference_is_second_minus_first(card_of, noise):
    first = card_of(noise + np.eye(200, dtype=np.float32), "first")
    second = card_of(noise + 2 * np.eye(200, dtype=np.float32), "second")
    comparison = compare_cards(first, second)
    for direction in ("query_to_item", "item_to_query"):
        entry = comparison["differences"][direction]["itc"]["recall@10"]
        values = [card["results"][direction]["itc"]["recall@10"]["value"] for card in (first, second)]
        assert [entry["first"], entry["second"]] == pytest.approx(values)
        assert entry["value"] == pytest.approx(values[1] - values[0])
        assert 0 < entry["low"] < entry["value"] < entry["high"]
        assert comparison["differences"][direction]["itc"]["mean_rank"]["value"] < 0
    text = render_comparison(comparison)
    assert "second.npy - first.npy" in text and "recall@10" in text


def test_a_model_does_not_differ_from_itself(card_of, noise):
    card = card_of(noise)
    for kinds in compare_cards(card, card)["differences"].values():
        for entry in kinds["itc"].values():
            assert (entry["value"], entry["low"], entry["high"]) == (0, 0, 0)


def test_different_protocols_are_refused_by_name(card_of, noise):
    card = card_of(noise)
    other = copy.deepcopy(card)
    other["protocol"]["bootstrap"]["seed"] = 1
    other["protocol"]["frames"] = 12
    other["protocol"]["version"] = 2
    with pytest.raises(InvalidInput) as refusal:
        compare_cards(card, other, ("a.json", "b.json"))
    for part in (
        "a.json",
        "b.json",
        "bootstrap.seed: 0 and 1",
        "frames: '(absent)' and 12",
        "version: 1 and 2",
    ):
        assert part in str(refusal.value)


def test_other_positives_are_another_protocol(card_of, noise):
    card = card_of(noise)
    aware = card_of(noise, positives=[[i, (i + 1) % 200] for i in range(200)])
    with pytest.raises(InvalidInput, match="positives_sha256"):
        compare_cards(card, aware)


@pytest.mark.parametrize("kind", ["itm@10", "dsl", "bank"])
def test_kinds_of_score_are_never_mixed(card_of, noise, kind):
    other = np.where(noise >= np.sort(noise)[:, -10:][:, :1], noise, -100) if "@" in kind else noise
    with pytest.raises(InvalidInput, match="share no kind of score"):
        compare_cards(card_of(noise, "a"), card_of(other, "b", kind=kind))


def test_dual_softmax_looks_better_and_stays_apart(card_of):
    """It uses the other test queries: better on this set, no better for one query at a time."""
    random = np.random.default_rng(1)
    hubs = 1.5 * random.standard_normal(200)  # some clips are near to every caption
    scores = (random.standard_normal((200, 200)) + hubs + 3 * np.eye(200)).astype(np.float32)
    shares = np.exp(scores) / np.exp(scores).sum(axis=0, keepdims=True)
    raw, dual = card_of(scores, "raw"), card_of(scores * shares, "dual", kind="dsl")
    value = raw["results"]["query_to_item"]["itc"]["recall@1"]["value"]
    assert dual["results"]["query_to_item"]["dsl"]["recall@1"]["value"] > value + 0.05
    one_at_a_time = [row * (np.exp(row) / np.exp(row)) for row in scores]
    assert np.mean(np.argmax(one_at_a_time, axis=1) == np.arange(200)) == pytest.approx(value)
    with pytest.raises(InvalidInput, match="share no kind"):
        compare_cards(raw, dual)


def test_corrections_of_other_settings_are_not_compared(card_of, noise, tmp_path):
    card = card_of(noise)
    files = tmp_path / "scores.npy", tmp_path / "positives.json"
    kinds = [MatrixFiles(dual_softmax=True, scale=scale) for scale in (1.0, 20.0)]
    cards = [evaluate_scores(*files, kind, bootstrap=BootstrapSettings(resamples=300)) for kind in kinds]
    with pytest.raises(InvalidInput, match="dsl scores of different settings: scale: 1.0 and 20.0"):
        compare_cards(*cards)
    assert set(compare_cards(cards[0], card)["differences"]["query_to_item"]) == {"itc"}
    assert set(compare_cards(cards[0], cards[0])["differences"]["query_to_item"]) == {"itc", "dsl"}


def test_gains_are_compared_where_both_cards_have_them(card_of, noise):
    first = card_of(noise, "first")
    second = card_of(noise + 2 * np.eye(200, dtype=np.float32), "second")
    block = compare_cards(first, second)["differences"]["query_to_item"]["itc"]
    for name in ("ndcg@10", "map"):
        values = [card["results"]["query_to_item"]["itc"][name]["value"] for card in (first, second)]
        assert block[name]["value"] == pytest.approx(values[1] - values[0])
        assert block[name]["low"] > 0
    for name in ("ndcg@10", "map"):  # as in a card of before they were measured
        del first["per_query"]["query_to_item"]["itc"][name]
    assert "map" not in compare_cards(first, second)["differences"]["query_to_item"]["itc"]


def test_cards_without_the_outcome_of_each_query(card_of, noise):
    card = card_of(noise)
    bare = {key: value for key, value in card.items() if key != "per_query"}
    with pytest.raises(InvalidInput, match="second.json: the card lacks 'per_query'"):
        compare_cards(card, bare, ("first.json", "second.json"))
    other = copy.deepcopy(card)
    other["per_query"]["query_to_item"]["itc"]["groups"][0] = 77
    with pytest.raises(InvalidInput, match="different queries"):
        compare_cards(card, other)


def test_fields_are_named_by_their_path():
    found = differing_fields({"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": 2, "c": [1]}})
    assert found == [("a.b", 1, 2), ("d", 1, "(absent)")]
    assert differing_fields({"a": [1, 2]}, {"a": [1, 2]}) == []
