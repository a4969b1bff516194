"""Minimal pairs: exact, the same everywhere, and measured by models whose answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from vlm import world
from vlm.errors import UsageError
from vlm.evaluation import load_protocol
from vlm.evaluation.card.table import render_card
from vlm.evaluation.pairs.minimal import world_foils
from vlm.evaluation.runner import RunOptions, evaluate_model
from vlm.types import TextFeatures, VideoFeatures


@pytest.fixture(scope="module")
def foils(scenes):
    return world_foils(scenes)


@pytest.fixture
def with_foils(data, foils):
    return dataclasses.replace(data, foils=foils)


class Reader:
    """Scores a caption by how many of its words stand in the clip's own caption, in order or as a bag.

    ``blind`` kinds of word look alike to it.
    """

    def __init__(self, toy, queries, blind=()):
        self._toy, self._queries, self.blind = toy, queries, blind
        self.vocabulary = {}
        for name in (
            "name",
            "kind",
            "domain",
            "fingerprint",
            "preprocessing",
            "device",
            "logit_scale",
            "unknown_words",
        ):
            setattr(self, name, getattr(toy, name))
        self.capabilities = frozenset({"search", "rerank"})

    def _vector(self, text):
        words = tuple("?" if word in self.blind else word for word in text.split())
        place = self.vocabulary.setdefault(words, len(self.vocabulary))
        return torch.nn.functional.one_hot(torch.tensor(place), 500).float()

    def encode_text(self, texts):
        rows = torch.stack([self._vector(text) for text in texts])
        return TextFeatures(rows[:, None], torch.ones(len(rows), 1, dtype=torch.int64), rows)

    def encode_video(self, video):
        clips = [self._toy._see(clip, "order").argmax() for clip in video]
        rows = torch.stack([self._vector(self._queries[int(clip)]) for clip in clips])
        return VideoFeatures(rows[:, None], rows[:, None], rows)

    def match(self, video_tokens, text_tokens, mask):
        right = (video_tokens[:, 0] * text_tokens[:, 0]).sum(-1)
        return torch.stack([-right, right], dim=1)


def test_foils_are_false_and_differ_in_words(scenes, foils):
    assert world_foils(scenes) == foils
    assert {foil.kind for foil in foils} >= {"digit", "direction"}
    for foil in foils:
        assert foil.text != world.caption(scenes[foil.query])
    # another gallery around a scene changes nothing about its foils
    alone = [foil for foil in foils if foil.query == 4]
    assert [(f.kind, f.text) for f in world_foils(scenes[4:5])] == [(f.kind, f.text) for f in alone]


def test_who_reads_everything_is_right_in_every_pair(toy, with_foils, protocol, load):
    card = evaluate_model(Reader(toy("order"), with_foils.queries), with_foils, protocol, load)
    for score in ("itc", "itm"):
        table = card["minimal_pairs"][score]
        assert {entry["accuracy"]["value"] for entry in table.values()} == {1.0}
        assert table["all"]["num_pairs"] == len(with_foils.foils)
        assert sum(entry["num_pairs"] for entry in table.values()) == 2 * len(with_foils.foils)
    text = render_card(card)
    assert "minimal pairs: the right caption above one that differs in one thing; guessing 50.0" in text
    assert any(line.startswith("direction ") for line in text.splitlines())


def test_who_cannot_read_digits_guesses_at_digits_only(toy, with_foils, protocol, load):
    reader = Reader(toy("order"), with_foils.queries, blind=set("0123456789"))
    table = evaluate_model(reader, with_foils, protocol, load)["minimal_pairs"]["itm"]
    assert table["digit"]["accuracy"]["value"] == 0.5
    assert table["direction"]["accuracy"]["value"] == 1.0


def test_clips_that_are_left_out_take_their_pairs_along(toy, with_foils, protocol, load):
    broken = dataclasses.replace(
        with_foils, paths=(with_foils.paths[0].with_name("gone"), *with_foils.paths[1:])
    )
    reader = Reader(toy("order"), with_foils.queries)
    card = evaluate_model(reader, broken, protocol, load, options=RunOptions(allow_missing=True))
    kept = [foil for foil in with_foils.foils if foil.query != 0]
    assert card["minimal_pairs"]["itc"]["all"]["num_pairs"] == len(kept)
    assert card["minimal_pairs"]["itc"]["all"]["accuracy"]["value"] == 1.0


def test_only_a_world_has_them():
    assert load_protocol("world").minimal_pairs
    with pytest.raises(UsageError, match="only a world has them"):
        load_protocol("msvd", ("minimal_pairs=true",))


def test_the_mean_over_kinds_is_weighted_by_pairs(toy, with_foils, protocol, load):
    reader = Reader(toy("order"), with_foils.queries, blind=set("0123456789"))
    table = dict(evaluate_model(reader, with_foils, protocol, load)["minimal_pairs"]["itc"])
    whole = table.pop("all")
    values = np.asarray([[entry["accuracy"]["value"], entry["num_pairs"]] for entry in table.values()])
    assert whole["accuracy"]["value"] == pytest.approx(np.average(values[:, 0], weights=values[:, 1]))
