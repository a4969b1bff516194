"""Dual softmax and query bank in cards: names, warnings, one query, equal captions, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlm.errors import InvalidInput, UsageError
from vlm.evaluation import MatrixFiles, evaluate_scores, render_card
from vlm.evaluation.protocol import BootstrapSettings

QUICK = BootstrapSettings(resamples=100)
N = 200


@pytest.fixture
def write(tmp_path):
    def files(scores, positives=None, **named):
        np.save(tmp_path / "scores.npy", scores)
        lists = positives or [[i] for i in range(len(scores))]
        (tmp_path / "positives.json").write_text(json.dumps(lists))
        if "bank" in named:
            np.save(tmp_path / "bank.npy", named["bank"])
            named["bank"] = tmp_path / "bank.npy"
        if "captions" in named:
            (tmp_path / "captions.json").write_text(json.dumps(named["captions"]))
            named["captions"] = tmp_path / "captions.json"
        paths = tmp_path / "scores.npy", tmp_path / "positives.json"
        return evaluate_scores(*paths, MatrixFiles(**named), bootstrap=QUICK)

    return files


@pytest.fixture(scope="module")
def hubs():
    """Scores and a bank in which some items are near to every caption."""
    random = np.random.default_rng(1)
    lift = 1.5 * random.standard_normal(N)
    scores = random.standard_normal((N, N)) + lift + 3 * np.eye(N)
    return scores.astype(np.float32), (random.standard_normal((500, N)) + lift).astype(np.float32)


def _recall(card, kind, direction="query_to_item"):
    return card["results"][direction][kind]["recall@1"]["value"]


def test_each_kind_has_its_name_and_the_raw_one_comes_first(write, hubs):
    card = write(hubs[0], bank=hubs[1], dual_softmax=True, scale=1.0)
    assert list(card["results"]["query_to_item"]) == ["itc", "dsl", "bank"]
    assert list(card["results"]["item_to_query"]) == ["itc", "dsl"]
    assert _recall(card, "dsl") > _recall(card, "itc") + 0.05
    assert _recall(card, "bank") > _recall(card, "itc") + 0.05
    assert card["kinds"]["dsl"]["transductive"] is True
    assert card["kinds"]["dsl"]["demand_share"] == pytest.approx(1.0)
    assert card["kinds"]["bank"] == {"inductive": True, "settings": {"scale": 1.0, "num_queries": 500}}
    assert set(card["ties"]["query_to_item"]) == {"itc", "dsl", "bank"}
    assert "dsl is transductive" in render_card(card)
    plain = write(hubs[0])
    assert plain["results"]["query_to_item"]["itc"] == card["results"]["query_to_item"]["itc"]
    assert plain["kinds"] == {} and "transductive" not in render_card(plain)


def test_in_the_other_direction_dual_softmax_is_that_of_the_transposed_matrix(write, hubs):
    card, turned = (write(scores, dual_softmax=True, scale=1.0) for scores in (hubs[0], hubs[0].T))
    for measure, entry in card["results"]["item_to_query"]["dsl"].items():
        assert turned["results"]["query_to_item"]["dsl"][measure]["value"] == pytest.approx(entry["value"])


def test_queries_that_all_want_a_few_items_are_warned_of(write, hubs):
    card = write(hubs[0], [[i % 10] for i in range(N)], dual_softmax=True, scale=1.0)
    assert card["kinds"]["dsl"]["demand_share"] == pytest.approx(0.05)
    assert "as 10 of 200 items wanted alike" in card["kinds"]["dsl"]["warning"]
    assert card["kinds"]["dsl"]["warning"] in render_card(card)


def test_one_query_gets_the_bank_and_nothing_from_dual_softmax(write, hubs):
    scores, bank = hubs
    whole = write(scores, bank=bank, scale=1.0)["per_query"]["query_to_item"]["bank"]
    for query in (0, 3, 77):
        card = write(scores[query : query + 1], [[query]], bank=bank, dual_softmax=True, scale=1.0)
        above = {
            kind: card["per_query"]["query_to_item"][kind]["above"][0] for kind in ("itc", "dsl", "bank")
        }
        assert above["bank"] == whole["above"][query]
        assert above["dsl"] == above["itc"]


@pytest.mark.parametrize("kind", ["itm@3", "dsl", "bank"])
def test_only_raw_scores_are_corrected(write, kind):
    for named in ({"dual_softmax": True}, {"bank": np.eye(3)}, {"captions": list("abc")}):
        with pytest.raises(UsageError, match=f"go with itc scores, not with {kind}"):
            write(np.eye(3), kind=kind, **named)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"bank": np.eye(4)}, r"expected 3 items, got shape \(4, 4\)"),
        ({"bank": np.full((2, 3), np.nan)}, "6 of 6 scores are not finite"),
        ({"bank": np.eye(3), "scale": 0.0}, "positive scale"),
        ({"dual_softmax": True, "scale": -1.0}, "positive scale"),
        ({"captions": ["a", "b"]}, "expected 3 captions, one a query, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(write, named, message):
    with pytest.raises(InvalidInput, match=message):
        write(np.eye(3), **named)


def test_equal_captions_joined_beside_the_strict_result(write):
    """Nine queries with four texts among a thousand: the strict ceiling is half a point below certainty."""
    texts = [f"caption {i}" for i in range(1000)]
    for group in ((0, 1, 2), (3, 4), (5, 6), (7, 8)):
        for number, query in enumerate(group):
            texts[query] = f"The same, {group[0]}" + "!" * number  # equal once cleaned
    truth = np.eye(1000, dtype=np.float32)
    for group in ((0, 1, 2), (3, 4), (5, 6), (7, 8)):
        truth[np.ix_(group, group)] = 1.0  # who reads equal texts gives equal scores
    card = write(truth, captions=texts)
    block = card["duplicates"]
    assert (block["texts"], block["queries"]) == (4, 9)
    assert block["strict_ceiling"]["recall@1"]["value"] == pytest.approx(1 - 0.0050)
    assert _recall(card, "itc") == pytest.approx(1 - 0.0050)
    assert block["results"]["query_to_item"]["itc"]["recall@1"]["value"] == 1.0
    assert block["results"]["item_to_query"]["itc"]["recall@1"]["value"] == 1.0
    assert "equal captions joined" in render_card(card)


def test_different_captions_have_nothing_to_join(write):
    card = write(np.eye(3), captions=["a", "b", "c"])
    assert card["duplicates"] == {"texts": 0, "queries": 0}
    # the same words about the same item change nothing either
    assert write(np.eye(3), [[0], [0], [2]], captions=["a", "a", "c"])["duplicates"]["queries"] == 0
    assert write(np.eye(3))["duplicates"] == {}
