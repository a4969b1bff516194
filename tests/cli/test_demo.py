"""The demonstration from videos to picture, with models that know nothing: it must say chance."""

from __future__ import annotations

import re

import pytest
import torch

from vlm.cli import main
from vlm.cli.demo import Outcome
from vlm.cli.demo.contact_sheet import draw_contact_sheet
from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
from vlm.text import build_tokenizer
from vlm.types import Hit
from vlm.world import vocabulary


def ignorant_model(zero):
    tokenizer = build_tokenizer(vocabulary())
    config = VideoTextConfig(
        vision=VideoMambaConfig(width=32, depth=1, image_size=32, patch_size=16, num_frames=8),
        text=TextEncoderConfig(
            vocabulary_size=tokenizer.vocabulary_size,
            width=32,
            num_layers=2,
            fusion_layer=1,
            num_heads=2,
            intermediate_width=32,
            max_positions=48,
            vision_width=32,
            dropout=0.0,
        ),  # fmt: skip
        embedding_width=32,
    )
    model = VideoTextModel(config, tokenizer=tokenizer, name="ignorant", domain="digit-world")
    if zero:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("zero", [True, False])
def test_a_model_that_knows_nothing_is_told_from_one_that_knows(tmp_path, capsys, zero):
    save_model(ignorant_model(zero), tmp_path / "model")
    words = ["demo", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--reels", "4"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    first, total, chance = re.search(
        r"right for (\d+) of (\d+) captions .* chance ([\d.]+)%", printed
    ).groups()
    assert int(total) == 16
    assert 6.0 <= float(chance) <= 13.0  # each caption is true of its own clip, and seldom of another
    assert int(first) <= 6  # seven or more of sixteen come by chance once in 5,000 times
    assert (tmp_path / "out" / "contact-sheet.png").stat().st_size > 10_000
    assert len(list((tmp_path / "out").glob("videos-*/*.mp4"))) == 4
    assert "vlm ask" in printed
    # run again: the videos are known, and the answer is the same
    assert main(words) == 0
    assert capsys.readouterr().out == printed


def test_too_few_reels_are_refused(tmp_path, capsys):
    assert main(["demo", "--reels", "1", "--out", str(tmp_path)]) == 4
    assert "--reels must be at least 2" in capsys.readouterr().err


def test_the_sheet_shows_each_hit_in_its_colour(tmp_path):
    import numpy as np
    from PIL import Image

    from vlm.world.clips import encode

    encode(np.full((40, 64, 64, 3), 200, np.uint8), tmp_path / "clip.mp4")
    hits = tuple(
        Hit(rank=rank, video_id="v", path=str(tmp_path / "clip.mp4"), start_s=0.0, end_s=5.0, score=0.5,
            score_kind="itc")
        for rank in (1, 2)
    )  # fmt: skip
    draw_contact_sheet(
        [Outcome(query="word " * 80, hits=hits, is_true=(True, False))], tmp_path / "sheet.png"
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    column = sheet[:, 21]
    assert (column == (72, 199, 116)).all(axis=1).sum() == (column == (226, 88, 88)).all(axis=1).sum() == 73
    assert (np.abs(sheet.astype(int) - 200).max(axis=2) < 6).sum() > 15 * 60 * 60
