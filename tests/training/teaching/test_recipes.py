"""The shipped stages: the published numbers, the chain from one to the next, the small ones run."""

import pytest
import torch

from vlm.config import load_config
from vlm.training.config import TrainingConfig

# by corpus: samples, GPUs; by stage: epochs, warm-up epochs, clips a GPU, highest and last learning rate
SAMPLES = {"5m": 5.37e6, "17m": 18.57e6, "25m": 26.81e6, "k400": 240_436}
GPUS = {"5m": 16, "17m": 32, "25m": 32, "k400": 32}
STAGES = {
    "align": (800, 40, 64, 1.2e-3, 1e-5),
    "masked": (10, 1, 128, 4e-4, 4e-6),
    "whole": (1, 0.2, 64, 8e-5, 8e-7),
}
# table VII: pictures and clips of each set, and captions where they are more
MEDIA = {
    "cc3m": 2.88e6, "cc12m": 11.00e6, "sbu": 860e3, "coco": 113e3, "vg": 100e3, "webvid2m": 2.49e6,
    "webvid10m": 10.73e6,
}  # fmt: skip
TEXTS = {"coco": 567e3, "vg": 768e3}
ALL_PICTURES = ["cc3m", "cc12m", "sbu", "coco", "vg"]
PICTURES = {"5m": ["cc3m"], "17m": ALL_PICTURES, "25m": ALL_PICTURES}
VIDEOS = {"5m": ["webvid2m"], "17m": ["webvid2m"], "25m": ["webvid10m"]}
PUBLISHED = [
    "align",
    *(f"{stage}_{corpus}" for stage in ("masked", "whole") for corpus in ("5m", "17m", "25m")),
]


@pytest.fixture
def stage(root):
    return lambda name, *overrides: load_config(
        TrainingConfig, root / "configs" / "train" / "stages" / f"{name}.yaml", overrides
    )


def test_no_stage_is_left_out(root):
    names = {path.stem for path in (root / "configs" / "train" / "stages").iterdir()}
    assert names == {*PUBLISHED, "digits_align", "digits_masked", "digits_whole"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_published_one(stage, name):
    kind, _, corpus = name.partition("_")
    corpus = corpus or "k400"
    epochs, warmup, share, peak, lowest = STAGES[kind]
    config = stage(name)
    optimizer, losses, vision = config.optimizer, config.losses, config.model.vision
    assert config.train.batch_size == share * GPUS[corpus]
    epoch = SAMPLES[corpus] / config.train.batch_size
    assert config.train.max_steps == pytest.approx(epochs * epoch, rel=1e-3)
    assert optimizer.warmup_steps == pytest.approx(warmup * epoch, rel=1e-3)
    assert optimizer.learning_rate == peak
    assert optimizer.learning_rate * optimizer.final_ratio == pytest.approx(lowest, rel=1e-3)
    assert optimizer.betas == ((0.9, 0.95) if kind == "align" else (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.ema_decay) == (0.05, 0.0, 0.0)
    assert (vision.width, vision.depth, vision.num_frames, vision.image_size) == (576, 32, 8, 224)
    assert vision.drop_path == (0.4 if kind == "align" else 0.25)
    texts = (losses.contrastive.weight, losses.matching.weight, losses.masked_language.weight)
    assert texts == ((0, 0, 0) if kind == "align" else (1, 1, 1))
    assert losses.alignment.weight == (0 if kind == "whole" else 1)
    alignment = losses.alignment
    assert (alignment.mask, alignment.ratio, alignment.picture_ratio) == ("attention", 0.8, 0.5)
    if kind != "align":
        assert config.data.max_words == 32 and losses.masked_language.probability == 0.5
        shards = config.data.shards
        assert shards.augmentation is not None and shards.augmentation.flip == 0.5
        assert {name: (each.media, each.batch_size) for name, each in shards.corpora.items()} == {
            "pictures": ("image", None),
            "videos": ("video", None),
        }
        sets = {
            name: [folder.removeprefix("shards/") for folder in each.folders]
            for name, each in shards.corpora.items()
        }
        assert sets == {"pictures": PICTURES[corpus], "videos": VIDEOS[corpus]}
        updates = {
            name: each.weight * sum(MEDIA[member] for member in sets[name]) / config.train.batch_size
            for name, each in shards.corpora.items()
        }
        captions = sum(TEXTS.get(member, MEDIA[member]) for member in sets["pictures"])
        assert sum(updates.values()) == pytest.approx(epoch, rel=1e-3)
        assert updates["pictures"] == pytest.approx(captions / config.train.batch_size, rel=1e-3)


@pytest.mark.parametrize(
    "chain",
    [
        *(("align", f"masked_{corpus}", f"whole_{corpus}") for corpus in ("5m", "17m", "25m")),
        ("digits_align", "digits_masked", "digits_whole"),
    ],
    ids=lambda chain: chain[-1],
)
def test_each_stage_starts_from_the_one_before(stage, root, chain):
    assert stage(chain[0]).train.init_from is None
    for before, name in zip(chain, chain[1:], strict=False):
        first = (root / "configs" / "train" / "stages" / f"{before}.yaml").read_text().splitlines()[0]
        assert stage(name).train.init_from == f"{first.rpartition('--out ')[2]}/model"
        assert stage(name).data.shards.corpora == stage(chain[1]).data.shards.corpora


def test_the_small_stages_run_one_after_the_other(stage, root, tmp_path):
    if not (root / "eval" / "models" / "demo-teacher").is_dir():
        pytest.skip("the demonstration model's teacher is not here")
    from vlm.models.weights.folder import read_card
    from vlm.training.loop import train
    from vlm.training.reports.tracking import read_lines

    quick = ("train.max_steps=2", "train.batch_size=4", "data.workers=0", "evaluation.every=0")
    start: tuple[str, ...] = ()
    for name in ("digits_align", "digits_masked", "digits_whole"):
        folder = train(stage(name, *quick, *start), tmp_path / name)
        assert torch.isfinite(
            torch.tensor([line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")])
        ).all()
        start = (f"train.init_from={folder}",)
    # the last model tells what it came from, and that model what it came from
    masked = read_card(folder)["training"]["started_from"]
    aligned = masked["training"]["started_from"]
    assert (masked["name"], aligned["name"]) == ("digits-masked", "digits-aligned")
    assert aligned["training"]["steps"] == 2 and "started_from" not in aligned["training"]
    assert aligned["weights_sha256"] == read_card(tmp_path / "digits_align" / "model")["weights_sha256"]
