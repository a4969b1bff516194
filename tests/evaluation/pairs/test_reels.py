"""Claims about reels, judged by models that know all, nothing, or what a bag of frames knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm.__main__ import main
from vlm.errors import CapabilityError
from vlm.evaluation import compare, read_card, write_card
from vlm.evaluation.pairs.reels import judge, measure_reels, table
from vlm.models import VideoTextModel, load_model
from vlm.types import Preprocessing, TextFeatures, VideoFeatures
from vlm.world.chapters.claims import asked_groups
from vlm.world.scene import COLOURS

_COLOURS = np.array(list(COLOURS.values()), dtype=np.float64)
_WORDS = ["a", "an", "and", "then", *COLOURS]
_FIRST = _WORDS.index(next(iter(COLOURS)))


class Reader:
    """Reads the two colours of every frame from its pixels, and those of a claim from its words.

    A claim scores by the frames that show its colours; an order by how much later the second are seen.
    """

    name, kind, domain, fingerprint = "reader", "video-text", "digit-world", "0"
    device = torch.device("cpu")

    def __init__(self, num_frames: int, capabilities: tuple[str, ...], *, knows: str) -> None:
        self.preprocessing = Preprocessing(
            num_frames=num_frames, image_size=64, mean=(0.0,) * 3, std=(1.0,) * 3
        )
        self.capabilities = frozenset(capabilities)
        self.knows = knows

    def encode_video(self, video: torch.Tensor) -> VideoFeatures:
        pixels = 255 * video.permute(0, 1, 3, 4, 2).reshape(*video.shape[:2], -1, 1, 3).double().numpy()
        distance = np.abs(pixels - _COLOURS).sum(-1)
        nearest = np.eye(len(COLOURS))[distance.argmin(-1)] * (distance.min(-1) < 120)[..., None]
        counts = torch.from_numpy(nearest.sum(2))
        seen = torch.zeros(counts.shape).scatter(2, counts.topk(2).indices, 1.0)
        return VideoFeatures(seen, seen, seen.mean(1))

    def encode_text(self, texts: list[str]) -> TextFeatures:
        words = [[_WORDS.index(word) for word in text.split()] for text in texts]
        mask = torch.tensor([[1] * len(row) + [0] * (11 - len(row)) for row in words])
        tokens = torch.tensor([row + [0] * (11 - len(row)) for row in words])[..., None].float()
        colours = torch.tensor([[float(_FIRST + c in row) for c in range(len(COLOURS))] for row in words])
        return TextFeatures(tokens, mask, colours)

    def match(self, video: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = []
        for frames, words, length in zip(video, text[..., 0].long(), mask.sum(1), strict=True):
            named = [int(word) - _FIRST for word in words[:length] if word >= _FIRST]
            shown = [
                (frames[:, named[at]] * frames[:, named[at + 1]]).nonzero()[:, 0]
                for at in range(0, len(named), 2)
            ]
            if self.knows == "nothing" or (len(shown) == 2 and self.knows == "colours"):
                scores.append(0.0)
            elif len(shown) == 1:
                scores.append(float(len(shown[0]) > 0))
            else:
                known = all(len(places) for places in shown)
                early, late = (places.float().mean() for places in shown)
                scores.append(float(late - early) if known else 0.0)
        return torch.tensor([[0.0, score] for score in scores])


def test_what_each_reader_reaches() -> None:
    figures = {}
    for knows in ("nothing", "colours", "all"):
        model = Reader(32, ("search", "rerank"), knows=knows)
        card = measure_reels(model, "test", 3, 4)  # type: ignore[arg-type]
        figures[knows] = {kind: row["accuracy"]["value"] for kind, row in card["reels"].items()}
        assert card["score"] == "itm" and card["protocol"]["num_reels"] == 16
        assert {kind: row["num_pairs"] for kind, row in card["reels"].items()} == {
            "presence": 128,
            "order": 128,
        }
        assert card["reels"]["order"]["ceiling"]["value"] == 1
    assert figures["nothing"] == {"presence": 0.5, "order": 0.5}
    assert figures["colours"]["order"] == 0.5 and figures["colours"]["presence"] > 0.85
    assert figures["all"]["order"] > 0.85 and figures["all"]["presence"] == figures["colours"]["presence"]


def test_outcomes_are_those_of_the_pairs_and_cards_compare(tmp_path: Path) -> None:
    cards = []
    for number, frames in enumerate((8, 32)):
        model = Reader(frames, ("rerank",), knows="all")
        card = measure_reels(model, "val", 0, 3)  # type: ignore[arg-type]
        asked = [item for group in asked_groups("val", 0, 3) for item in group]
        hits = judge(model, asked, report=False)  # type: ignore[arg-type]
        kinds = np.array([[pair.kind for pair in item.pairs] for item in asked])
        for kind in ("presence", "order"):
            block = card["per_query"][kind]["itm"]
            assert block["right"] == hits[kinds == kind].tolist()
            assert block["groups"] == np.repeat([0, 1, 2], 4 * 8).tolist()
        write_card(card, tmp_path / f"{number}.json")
        cards.append(read_card(tmp_path / f"{number}.json"))
    found = compare.compare_cards(*cards)["differences"]
    expected = (
        cards[1]["reels"]["order"]["accuracy"]["value"] - cards[0]["reels"]["order"]["accuracy"]["value"]
    )
    assert found["order"]["itm"]["accuracy"]["value"] == pytest.approx(expected)
    assert cards[0]["reels"]["order"]["ceiling"]["value"] < 0.9
    assert table(cards[0]).count("\n") == 3 and "| presence | " in table(cards[0])


def test_a_model_without_a_matching_head_is_judged_by_its_embeddings() -> None:
    model = Reader(32, ("search",), knows="all")
    card = measure_reels(model, "val", 0, 2)  # type: ignore[arg-type]
    assert card["score"] == "itc" and card["reels"]["order"]["accuracy"]["value"] == 0.5
    assert card["reels"]["presence"]["accuracy"]["value"] > 0.5
    with pytest.raises(CapabilityError, match="neither match nor search"):
        measure_reels(Reader(32, (), knows="all"), "val", 0, 2)  # type: ignore[arg-type]


def test_a_bag_of_frames_has_a_ceiling_of_its_own() -> None:
    model = load_model("demo-teacher", device="cpu", num_frames=32, image_size=32)
    assert isinstance(model, VideoTextModel)
    best = []
    for bag in (False, True):
        changed = replace(model.config.vision, independent_frames=bag)
        model.config = replace(model.config, vision=changed)
        model.vision_encoder.config = changed
        card = measure_reels(model, "val", 0, 1)
        assert card["is_bag_of_frames"] == bag
        best.append([row["ceiling"]["value"] for row in card["reels"].values()])
    assert best == [[1, 1], [1, 0.5]]


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "card.json"
    arguments = ["eval", "reels", "--model", "demo", "--split", "val", "--count", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "| order | " in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["per_query"] == read_card(out)["per_query"] and shown["protocol"]["split"] == "val"
    assert main([*arguments[:-1], "0"]) == 2
