"""Learning from reels: the stream, its parts, the losses in a run, and models of short clips grown long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.errors import ConfigError, UsageError
from vlm.models.video_text_model import VideoTextModel
from vlm.models.weights import load_model
from vlm.training.loop import build, train
from vlm.training.reels.source import ReelBatches
from vlm.training.reels.validation import ReelValidation
from vlm.training.setup import make_model, make_tokenizer
from vlm.training.sources.opening import open_source
from vlm.training.sources.parts import in_parts

CPU = torch.device("cpu")


def fresh(config) -> VideoTextModel:
    model = make_model(config, make_tokenizer(config), CPU)
    assert isinstance(model, VideoTextModel)
    return model


def stream(config, rank: int = 0, world_size: int = 1) -> ReelBatches:
    model = fresh(config)
    return ReelBatches(
        config.data.reels, seed=config.seed, batch_size=config.train.batch_size, rank=rank,
        world_size=world_size, preprocessing=model.preprocessing, tokenizer=model.tokenizer.to_json(),
        max_words=config.data.max_words,
    )  # fmt: skip


def test_a_batch_is_a_pure_function_of_its_number(small) -> None:
    one, again = stream(small())[3], stream(small())[3]
    assert all(torch.equal(a, b) for a, b in zip(one[:4], again[:4], strict=True)) and one.keys == again.keys
    other = stream(small("seed=1"))[3]
    assert not torch.equal(one.frames, other.frames)
    assert one.frames.shape == (4, 8, 3, 32, 32) and one.frames.dtype == torch.uint8
    assert one.positives.shape == (4, 4 * 8) and len(one.input_ids) == 32
    own = torch.stack([one.positives[row, 8 * row : 8 * row + 8] for row in range(4)])
    assert torch.equal(own, torch.tensor([True, False] * 4).expand(4, 8))


def test_parts_of_processes_make_the_batch(small) -> None:
    whole = stream(small())[1]
    parts = [stream(small(), rank, 2)[1] for rank in range(2)]
    assert torch.equal(torch.cat([part.frames for part in parts]), whole.frames)
    assert sum((part.keys for part in parts), ()) == whole.keys
    assert all(torch.equal(part.positives, whole.positives) for part in parts)


def test_short_reels_come_first(small) -> None:
    config = small("data.reels.num_scenes=[[0, 2], [4, 6]]")
    with open_source(config, fresh(config), 0) as batches:
        counts = [int(next(batches).positives[0].sum()) for _ in range(2)]
    assert min(counts) >= 4  # every reel's own two pairs of each kind
    stretched = in_parts(replace(config, train=replace(config.train, accumulate=2)))
    assert stretched.data.reels.num_scenes == ((0, 2), (8, 6)) and stretched.train.batch_size == 2


def test_both_losses_learn_a_batch_by_heart(small, tmp_path) -> None:
    config = small("optimizer.learning_rate=5e-3", "optimizer.warmup_steps=5", "optimizer.ema_decay=0.0")
    state = build(config, tmp_path, CPU)
    with open_source(config, state.model, 0) as batches:
        batch = next(batches)
    values = [state.update([batch], step, 0) for step in range(40)]
    for name in ("contrastive", "matching"):
        first, last = values[0][name], values[-1][name]
        assert last < first - 0.1, (name, first, last)


def test_a_bag_of_frames_ends_in_a_model_that_is_blind_to_order(small, tmp_path) -> None:
    run = tmp_path / "run"
    train(small("model.vision.independent_frames=true"), run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"val/presence", "val/order", "matching", "contrastive"} <= set(rows[-1])
    model = load_model(str(run / "model"), device="cpu")
    video = torch.randn(1, 8, 3, 32, 32)
    texts = model.encode_text(["a red 3 then a blue 5", "a red 3"])
    with torch.inference_mode():
        scores = []
        for shown in (video, video.flip(1)):
            features = model.encode_video(shown)
            scores.append(model.match(features.tokens, texts.tokens, texts.mask))
    torch.testing.assert_close(*scores)


def test_a_model_of_short_clips_grows(small, tmp_path) -> None:
    train(small(), tmp_path / "short")
    start = f"train.init_from={tmp_path / 'short' / 'model'}"
    grown = fresh(small(start, "model.vision.num_frames=32", "model.vision.image_size=64"))
    assert grown.preprocessing.num_frames == 32 and grown.preprocessing.image_size == 64
    assert grown.vision_encoder.temporal_pos_embedding.shape[1] == 32
    bag = fresh(small(start, "model.vision.independent_frames=true"))
    assert bag.config.vision.independent_frames and bag.vision_encoder.config.independent_frames
    short = load_model(str(tmp_path / "short" / "model"), device="cpu")
    assert torch.equal(bag.vision_encoder.norm.weight, short.vision_encoder.norm.weight)


def test_validation_is_fixed_and_leaves_the_model_in_training(small) -> None:
    config = small()
    model = fresh(config).train()
    found = [ReelValidation(config, model).run() for _ in range(2)]
    assert found[0] == found[1] and model.training and set(found[0]) == {"presence", "order"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["losses.masked_language.weight=0.5"], "all other losses to 0"),
        (["losses.contrastive.weight=0.0", "losses.matching.weight=0.0"], "one of these above"),
        (["train.batch_size=5"], "in pairs"),
        (["train.batch_size=6", "train.accumulate=2"], "in pairs"),
        (["evaluation.best=r1"], "presence or order where data.source is 'reels'"),
        (["data.reels.num_scenes=1.0"], "num_scenes must be 2 to 20"),
        (["data.reels.pairs=0"], "pairs at least 1"),
    ],
)
def test_a_run_on_reels_that_cannot_be(small, changes, message) -> None:
    with pytest.raises((ConfigError, UsageError), match=message):
        small(*changes)


def test_other_runs_are_not_judged_by_claims(tiny) -> None:
    with pytest.raises((ConfigError, UsageError), match="direction for other models, got order"):
        tiny("evaluation.best=order")


def test_the_shipped_recipe(tmp_path: Path) -> None:
    """Every arm of the study starts from the demonstration model, with its stem frozen."""
    from vlm.assets import asset
    from vlm.config import load_config
    from vlm.training.config import TrainingConfig

    config = load_config(
        TrainingConfig, asset("configs/train/long/digits.yaml"), ["model.vision.num_frames=64"]
    )
    model = fresh(config)
    assert model.preprocessing.num_frames == 64 and "rerank" in model.capabilities
    frozen = {name.split(".")[1] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"patch_embed"}
