"""The whole path on real clips with their captions: a model that knows nothing scores at chance."""

from __future__ import annotations

import pytest

from vlm.cli import main
from vlm.evaluation import read_card


@pytest.fixture(scope="module")
def clips(shared):
    folder = shared / "videos"
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no {folder / 'captions.csv'}")
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model of open vocabulary with random weights, small enough for seconds."""
    import torch

    from vlm.models import TextEncoderConfig, VideoMambaConfig, VideoTextConfig, VideoTextModel, save_model
    from vlm.text import build_tokenizer
    from vlm.types import Preprocessing

    tokenizer = build_tokenizer(["a dog runs on the beach while people watch a man and a woman in a room"])
    torch.manual_seed(11)
    text = TextEncoderConfig(
        vocabulary_size=tokenizer.vocabulary_size,
        dropout=0.0,
        width=32,
        num_layers=2,
        fusion_layer=1,
        num_heads=2,
        intermediate_width=64,
        max_positions=48,
        vision_width=32,
    )
    vision = VideoMambaConfig(width=32, depth=2, num_frames=4, image_size=32, patch_size=16)
    model = VideoTextModel(
        VideoTextConfig(vision=vision, text=text, embedding_width=16),
        tokenizer=tokenizer,
        preprocessing=Preprocessing(num_frames=4, image_size=32),
        name="untrained",
    )
    folder = tmp_path_factory.mktemp("models") / "untrained"
    save_model(model.eval(), folder)
    return folder


@pytest.mark.slow
def test_a_random_model_is_at_chance_on_real_clips(clips, untrained, tmp_path):
    out = tmp_path / "card.json"
    arguments = ["eval", "retrieval", "--protocol", "own", "--annotations", str(clips / "captions.csv")]
    arguments += ["--videos", str(clips), "--model", str(untrained), "--no-test-time-controls"]
    assert main([*arguments, "--out", str(out)]) == 0
    card = read_card(out)
    assert (card["data"]["videos_expected"], card["data"]["missing"]) == (70, [])
    assert card["protocol"]["num_queries"] == 140
    for direction, chance in card["chance"].items():
        for kind in ("itc", "itm@32"):
            found = card["results"][direction][kind]
            for name in ("recall@1", "recall@5", "recall@10"):
                assert found[name]["low"] <= chance[name]["value"] <= found[name]["high"], (direction, kind)
            assert found["recall@1"]["value"] < 0.1


def test_a_paragraph_benchmark_on_its_real_clips(clips, untrained, tmp_path, capsys):
    """Two clips of ActivityNet under its own protocol, with 4 frames; and its refusal without --set."""
    annotations = clips.parent / "annotations" / "mini" / "anet_captions_mini.json"
    if not annotations.is_file():
        pytest.skip(f"no {annotations}")
    out = tmp_path / "card.json"
    arguments = ["eval", "retrieval", "--protocol", "activitynet", "--annotations", str(annotations)]
    arguments += ["--videos", str(clips), "--model", str(untrained), "--out", str(out)]
    assert main(arguments) == 4
    assert "expected 4917, found 2" in capsys.readouterr().err
    assert main([*arguments, "--set", "expected=null", "--set", "frames=4", "--set", "rerank_k=2"]) == 0
    card = read_card(out)
    assert (card["protocol"]["num_queries"], card["protocol"]["num_items"], card["protocol"]["frames"]) == (
        2,
        2,
        4,
    )
    assert card["data"]["queries_truncated"] in (0, 1, 2)
    assert "image_size: 32 instead of 224" in card["deviations"]
    assert "published: VideoMamba-M 25M" in capsys.readouterr().out
