"""Models whose results are known beforehand, from clips to card."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.errors import CapabilityError, InvalidInput
from vlm.evaluation.card.table import render_card
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.evaluation.scores.corrections import Corrections
from vlm.metrics import Positives


def _value(card, *keys):
    for key in keys:
        card = card[key]
    return card["value"]


def _recall(card, kind, direction="query_to_item", k=1):
    return _value(card, "results", direction, kind, f"recall@{k}")


def test_perfect_model(toy, data, protocol, load):
    card = evaluate_model(toy("order"), data, protocol, load, source="toy")
    for direction in ("query_to_item", "item_to_query"):
        assert _recall(card, "itc", direction) == 1.0
        assert _recall(card, "itm@6", direction) == 1.0
        assert _value(card, "results", direction, "itc", "median_rank") == 1.0
    for kind in ("itc", "itm@6"):
        values = {name: entry["value"] for name, entry in card["twins"][kind].items()}
        assert values == dict.fromkeys(values, 1.0)
        assert len(values) == 7
    assert card["ties"]["query_to_item"]["itc"] == 0


def test_bag_of_frames_finds_the_pair_and_never_the_direction(toy, data, protocol, load):
    card = evaluate_model(toy("bag"), data, protocol, load)
    twins = {name: entry["value"] for name, entry in card["twins"]["itc"].items()}
    assert twins["pair_recall@1"] == pytest.approx(1.0)
    assert twins["recall@1"] == pytest.approx(0.5)
    assert twins["direction|pair"] == twins["direction"] == pytest.approx(0.5)
    assert (twins["video"], twins["text"]) == (pytest.approx(0.25), pytest.approx(0.25))
    assert card["ties"]["query_to_item"]["itc"] == len(data.queries)
    # order of frames does not matter to it, a single frame is not the bag
    shuffled = card["controls"]["shuffled-frames"]
    assert _recall(shuffled, "itc") == pytest.approx(0.5)
    chance = _value(card, "chance", "query_to_item", "recall@1")
    assert _recall(card["controls"]["first-frame"], "itc") == pytest.approx(chance)


def test_model_without_knowledge_is_at_chance(toy, data, protocol, load):
    card = evaluate_model(toy("nothing"), data, protocol, load)
    for kind, direction in (("itc", "query_to_item"), ("itc", "item_to_query")):
        for k in (1, 5, 10):
            assert _recall(card, kind, direction, k) == pytest.approx(
                _value(card, "chance", direction, f"recall@{k}")
            )
    twins = {name: entry["value"] for name, entry in card["twins"]["itc"].items()}
    chance = {name: entry["value"] for name, entry in card["twin_chance"].items()}
    assert twins == pytest.approx(chance)
    assert chance["pair_recall@1"] == pytest.approx(2 * chance["recall@1"])


def test_random_features_give_an_interval_that_contains_chance(toy, data, protocol, load):
    model = toy("order")
    generator = torch.Generator().manual_seed(0)
    model.truth = torch.randn(model.truth.shape, generator=generator)
    card = evaluate_model(model, data, protocol, load)
    entry = card["results"]["query_to_item"]["itc"]["recall@5"]
    assert entry["low"] <= _value(card, "chance", "query_to_item", "recall@5") <= entry["high"]


def test_random_captions_give_chance(toy, data, protocol, load):
    """The same perfect model, its captions dealt out anew: nothing but their truth can give a score."""
    order = np.random.default_rng(3).permutation(20)
    dealt = dataclasses.replace(data, queries=tuple(data.queries[i] for i in order))
    card = evaluate_model(toy("order"), dealt, protocol, load)
    right = float(np.mean([i in data.positives[q] for q, i in enumerate(order)]))
    assert _recall(card, "itc") == pytest.approx(right, abs=0.05)
    assert _recall(card, "itm@6") <= 0.2
    entry = card["results"]["query_to_item"]["itc"]["recall@1"]
    assert entry["low"] <= _value(card, "chance", "query_to_item", "recall@1") <= entry["high"]


def test_shuffled_frames_are_noise_to_a_model_of_order(toy, data, protocol, load):
    card = evaluate_model(toy("order"), data, protocol, load)
    control = card["controls"]["shuffled-frames"]
    assert _recall(card, "itc") == 1.0
    assert _recall(control, "itc") == pytest.approx(_value(card, "chance", "query_to_item", "recall@1"))
    assert control["kind"] == "test-time"


def test_matching_head_mends_direction_within_its_candidates(toy, data, protocol, load):
    model = toy("bag", head="order")
    card = evaluate_model(model, data, protocol, load)
    assert _recall(card, "itc") == pytest.approx(0.5)
    assert _recall(card, "itm@6") == 1.0
    assert _value(card, "twins", "itm@6", "direction|pair") == 1.0
    assert _value(card, "twins", "itm@6", "group") == 1.0
    names = set(card["results"]["query_to_item"]["itm@6"])
    assert names == {"recall@1", "recall@5"}  # no R@10 of six candidates, no median rank
    # each pair is scored once: candidates of both directions and the twins' grid overlap
    assert model.pairs_scored == card["cost"]["matching_pairs"] <= 2 * 6 * 20 + 40


def test_candidates_bound_what_the_head_can_find(toy, data, protocol, load):
    narrow = dataclasses.replace(protocol, rerank_k=1)
    card = evaluate_model(toy("nothing", head="order"), data, narrow, load)
    assert card["candidates_cut_in_ties"] == {"query_to_item": {"itm@1": 20}, "item_to_query": {"itm@1": 20}}
    assert _recall(card, "itm@1") < 0.5
    assert set(card["results"]["query_to_item"]["itm@1"]) == {"recall@1"}
    assert _value(card, "twins", "itm@1", "group") == 1.0  # the grid of twins is scored in full


def test_batch_sizes_change_nothing_and_bound_the_work(toy, data, protocol, load):
    cards = []
    for batch_size, pairs in ((3, 5), (64, 1000)):
        model = toy("bag", head="order")
        options = RunOptions(batch_size=batch_size, pair_batch_size=pairs)
        cards.append(evaluate_model(model, data, protocol, load, options=options))
        assert model.largest_batch <= batch_size
    assert cards[0]["results"] == cards[1]["results"]
    assert cards[0]["per_query"] == cards[1]["per_query"]


def test_tokens_in_a_file_give_the_same_card(toy, data, protocol, load, monkeypatch):
    from vlm.evaluation import features

    expected = evaluate_model(toy("bag", head="order"), data, protocol, load)
    monkeypatch.setattr(features, "_IN_MEMORY_BYTES", 0)
    card = evaluate_model(toy("bag", head="order"), data, protocol, load)
    assert card["results"] == expected["results"]
    broken = _with_missing(data, [1, 4])
    options = RunOptions(allow_missing=True)
    assert _recall(evaluate_model(toy("order"), broken, protocol, load, options=options), "itm@6") == 1.0


def _with_missing(data, numbers):
    paths = list(data.paths)
    for number in numbers:
        paths[number] = Path("gone.mp4")
    return dataclasses.replace(data, paths=tuple(paths))


def test_missing_clips_fail_unless_allowed(toy, data, protocol, load):
    broken = _with_missing(data, [3, 7])
    with pytest.raises(
        InvalidInput, match=r"2 of 20 clips cannot be read \(gone.mp4: missing.*--allow-missing"
    ):
        evaluate_model(toy("order"), broken, protocol, load)
    options = RunOptions(allow_missing=True)
    card = evaluate_model(toy("order"), broken, protocol, load, options=options)
    section = card["data"]
    assert (section["videos_expected"], section["videos_decoded"]) == (20, 18)
    assert [entry["clip"] for entry in section["missing"]] == [data.clip_ids[3], data.clip_ids[7]]
    assert all("missing" in entry["reason"] for entry in section["missing"])
    assert card["protocol"]["num_items"] == card["protocol"]["num_queries"] == 18
    assert card["protocol"]["num_twin_pairs"] == 8
    assert _recall(card, "itc") == 1.0
    assert "2 clips missing" in render_card(card)
    nothing = _with_missing(data, range(20))
    with pytest.raises(InvalidInput, match="nothing to evaluate"):
        evaluate_model(toy("order"), nothing, protocol, load, options=options)


def test_order_and_names_of_files_change_nothing(toy, data, protocol, load):
    card = evaluate_model(toy("bag", head="order"), data, protocol, load)
    assert card["invariance"] == {"gallery_reversed": {"largest_recall@1_change": 0.0}}
    order = np.random.default_rng(0).permutation(20)
    column = np.argsort(order)
    lists = [column[data.positives[query]].tolist() for query in order]
    moved = dataclasses.replace(
        data,
        clip_ids=tuple(f"renamed-{i}" for i in range(20)),
        paths=tuple(data.paths[i] for i in order),
        queries=tuple(data.queries[i] for i in order),
        positives=type(data.positives).from_lists(lists, 20),
        groups=data.groups[order],
        twin_of=column[data.twin_of[order]],
        tiers=tuple(data.tiers[i] for i in order),
    )
    other = evaluate_model(toy("bag", head="order"), moved, protocol, load)
    for kind in ("itc", "itm@6"):
        for name, entry in card["results"]["query_to_item"][kind].items():
            assert other["results"]["query_to_item"][kind][name]["value"] == pytest.approx(
                entry["value"], abs=0.005
            )


def test_models_that_cannot(toy, data, protocol, load):
    with pytest.raises(CapabilityError, match="cannot embed .* it can: classify"):
        evaluate_model(toy("order", capabilities=("classify",)), data, protocol, load)
    card = evaluate_model(toy("order", capabilities=("search",)), data, protocol, load)
    assert list(card["results"]["query_to_item"]) == ["itc"]
    assert list(card["twins"]) == ["itc"]


@pytest.mark.parametrize("part", ["video", "text", "match"])
def test_not_a_number_stops_the_evaluation(toy, data, protocol, load, part):
    model = toy("order")
    if part == "match":
        model.match = lambda video, text, mask: torch.full((len(mask), 2), math.nan)
    else:
        encode = getattr(model, f"encode_{part}")

        def broken(batch):
            features = encode(batch)
            features.embedding[-1, 3] = math.nan
            return features

        setattr(model, f"encode_{part}", broken)
    with pytest.raises(InvalidInput, match="not finite"):
        evaluate_model(model, data, protocol, load)


def test_trained_controls(toy, data, protocol, load):
    bag_card = evaluate_model(toy("bag"), data, protocol, load)
    controls = {"bag": bag_card, "weak": toy("nothing"), "also-bag": toy("bag")}
    card = evaluate_model(toy("order"), data, protocol, load, controls=controls)
    assert card["controls"]["bag"]["strong"] is True
    assert card["controls"]["also-bag"]["results"] == bag_card["results"]
    assert card["controls"]["weak"]["strong"] is False
    assert "void" in card["controls"]["weak"]["verdict"]
    text = render_card(card)
    assert "control bag, itc" in text and "void" in text
    other = {**bag_card, "protocol": {**bag_card["protocol"], "frames": 16}}
    with pytest.raises(InvalidInput, match="differ in: frames"):
        evaluate_model(toy("order"), data, protocol, load, controls={"bag": other})


def test_ceilings_stand_beside_the_model(toy, data, protocol, load):
    pair = (np.arange(20)[:, None] // 2 == np.arange(20) // 2).astype(np.float32)
    with_oracle = dataclasses.replace(data, oracles={"frame set": pair})
    card = evaluate_model(toy("order"), with_oracle, protocol, load)
    assert _value(card, "ceilings", "frame set", "query_to_item", "recall@1") == pytest.approx(0.5)
    assert "oracle frame set" in render_card(card)
    options = RunOptions(allow_missing=True)
    broken = dataclasses.replace(_with_missing(data, [0]), oracles={"frame set": pair})
    card = evaluate_model(toy("order"), broken, protocol, load, options=options)
    assert _value(card, "ceilings", "frame set", "query_to_item", "recall@1") == pytest.approx(10 / 19)


def test_card_says_what_was_measured(toy, data, protocol, load):
    model = toy("order")
    card = evaluate_model(model, data, protocol, load, source="models/toy")
    assert card["format"] == "vlm-card/1"
    assert card["protocol"]["frames"] == 8
    assert card["protocol"]["annotations_sha256"] == "0" * 64
    assert (card["protocol"]["rerank_k"], card["protocol"]["sampling"]) == (6, "middle")
    assert card["model"]["fingerprint"] == model.fingerprint
    assert card["model"]["source"] == "models/toy"
    assert card["model"]["preprocessing"]["image_size"] == 64
    assert {"total_s", "encode_ms_per_video", "matching_ms_per_pair"} <= set(card["cost"])
    assert sum(tier["itc"]["num_queries"] for tier in card["tiers"].values()) == 20
    assert json.loads(json.dumps(card, allow_nan=False)) == card  # plain JSON: tuples and arrays would differ
    for kinds in card["results"].values():
        for block in kinds.values():
            for entry in block.values():
                assert set(entry) == {"value", "low", "high"}
                assert entry["low"] <= entry["value"] <= entry["high"]


def test_corrections_of_a_models_scores(toy, data, protocol, load):
    """A hub that is near to every caption: the bank learns it from other captions, one query at a time."""
    model = toy("order")
    model.truth = model.truth + 0.6 * torch.eye(20)[7] * 3  # clip 7 answers everything
    seen = {f"training caption {i}": i for i in range(20)}
    model.row |= seen
    captions = (*seen, *data.queries[:3])
    corrections = Corrections(dual_softmax=True, bank_captions=captions, scale=5.0)
    card = evaluate_model(model, data, protocol, load, corrections=corrections)
    assert list(card["results"]["query_to_item"]) == ["itc", "itm@6", "dsl", "bank"]
    assert _recall(card, "itc") < 0.2
    assert _recall(card, "bank") == 1.0
    settings = card["kinds"]["bank"]["settings"]
    assert (settings["num_queries"], settings["left_out_as_queries"]) == (20, 3)
    assert len(settings["captions_sha256"]) == 64
    assert card["kinds"]["dsl"]["transductive"] is True
    with pytest.raises(InvalidInput, match="all 20 captions of the bank are queries under test"):
        only = Corrections(bank_captions=data.queries)
        evaluate_model(toy("order"), data, protocol, load, corrections=only)


def test_equal_captions_of_different_clips(toy, data, protocol, load):
    """Strict positives with two clips of one caption: half a hit each, and a whole one when joined."""
    strict = Positives.from_lists([[i] for i in range(20)], 20)
    queries = (data.queries[1].upper(), *data.queries[1:])
    model = toy("order")
    model.row[queries[0]] = model.row[queries[1]]
    model.truth = torch.eye(20)
    model.truth[1, :2] = 1.0
    doubled = dataclasses.replace(data, queries=queries, positives=strict)
    card = evaluate_model(model, doubled, protocol, load)
    assert (card["duplicates"]["texts"], card["duplicates"]["queries"]) == (1, 2)
    assert card["duplicates"]["strict_ceiling"]["recall@1"]["value"] == 0.95
    for kind in ("itc", "itm@6"):
        assert _recall(card, kind) == pytest.approx(0.95)
        assert _value(card, "duplicates", "results", "query_to_item", kind, "recall@1") == 1.0
        assert _value(card, "duplicates", "results", "item_to_query", kind, "recall@1") == 1.0
    assert "itc, equal captions joined" in render_card(card)
