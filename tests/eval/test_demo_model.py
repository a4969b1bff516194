"""The shipped model keeps what its card says, on clips that nobody has seen; and its recipe is its own."""

from __future__ import annotations

import json
import shutil

import pytest

from vlm.assets import asset
from vlm.cli import main
from vlm.config import load_config
from vlm.evaluation import read_card
from vlm.models import load_model
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import has_fast_bf16
from vlm.world import gallery
from vlm.world.clips import write_clips

FRESH_SEED = 20261126
FOLDER = "eval/models/demo"
TEACHER = "eval/models/demo-teacher"
# recipe → the log of the model that it made, and the losses whose first values rounding does not move
LOGS = {
    "configs/train/digits.yaml": (TEACHER, ("contrastive", "masked_language")),
    "configs/train/stages/digits_align.yaml": (FOLDER, ("alignment",)),
}


@pytest.fixture(scope="module")
def fresh_card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    write_clips(list(gallery("test", FRESH_SEED, 100, twins=True)), folder)
    out = folder / "card.json"
    files = ["--annotations", folder / "manifest.jsonl", "--videos", folder, "--out", out]
    words = ["eval", "retrieval", "--protocol", "world", "--model", "demo", *map(str, files)]
    assert main([*words, "--set", "bootstrap.resamples=500", "--no-test-time-controls"]) == 0
    return read_card(out)


@pytest.mark.parametrize("folder", [FOLDER, TEACHER])
def test_it_is_small_and_says_what_it_knows(folder):
    assert sum(path.stat().st_size for path in asset(folder).iterdir()) <= 12e6
    name = folder.rpartition("/")[2]
    model = load_model(name, device="cpu")
    assert (model.name, model.domain) == (name, "digit-world")
    assert model.capabilities == {"search", "rerank", "choose"}


def test_it_tells_the_stages_that_it_was_trained_in():
    training = json.loads((asset(FOLDER) / "card.json").read_text())["training"]
    found = []
    while training:
        config = load_config(TrainingConfig, asset(training["command"][2]))
        assert training["steps"] == config.train.max_steps and training["seed"] == config.seed == 0
        before = training.get("started_from", {})
        found.append((config.name, before.get("name")))
        training = before.get("training")
    assert found == [
        ("demo", "digits-masked"), ("digits-masked", "digits-aligned"), ("digits-aligned", None)
    ]  # fmt: skip
    teacher = load_config(TrainingConfig, asset("configs/train/digits.yaml"))
    training = json.loads((asset(TEACHER) / "card.json").read_text())["training"]
    assert (training["seed"], training["steps"]) == (teacher.seed, teacher.train.max_steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["itc", "itm@32", "itm+itc@32"])
def test_fresh_clips_score_as_the_card_says(fresh_card, kind):
    """Both galleries hold 100 clips and their twins; their intervals must meet."""
    committed = read_card(asset("eval/results/world-demo-200.json"))
    assert committed["protocol"]["num_items"] == fresh_card["protocol"]["num_items"] == 200
    assert committed["model"]["fingerprint"] == fresh_card["model"]["fingerprint"]
    compared = 0
    for section in ("results", "twins"):
        blocks = []
        for card in (committed, fresh_card):
            whole = card[section]["query_to_item"] if section == "results" else card[section]
            blocks.append(whole[kind])
        for name, entry in blocks[0].items():
            if name in ("recall@1", "pair_recall@1", "direction"):
                other = blocks[1][name]
                assert entry["low"] <= other["high"] and other["low"] <= entry["high"], (name, entry, other)
                compared += 1
    assert compared >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", LOGS)
def test_the_recipe_begins_as_its_log_says(tmp_path, recipe):
    """The first dozen steps are the same on every kernel, processor and precision; another seed's are not.

    From step 14 on the run is chaotic: gradient norms rise from 1.5 to 76, and rounding alone moves the mean
    contrastive loss of steps 41 to 50 further than other seeds do, so later steps are not compared.
    """
    # without instructions for bf16 the committed precision takes fifteen times as long as fp32
    precision = "bf16" if has_fast_bf16() else "fp32"
    options = ["train.max_steps=12", "evaluation.every=0", f"train.precision={precision}"]
    train(load_config(TrainingConfig, asset(recipe), options), tmp_path / "run")
    folder, losses = LOGS[recipe]
    found = read_lines(tmp_path / "run" / "metrics.jsonl")
    committed = read_lines(asset(f"{folder}/training.jsonl"))[:12]
    assert [line["step"] for line in found] == [line["step"] for line in committed] == list(range(1, 13))
    # kernels, fp32 differ by 0.0004, 0.0002 and 0.007 at most, seeds 1 and 2 by 0.001, 0.01 and 0.15 at least
    for name, tolerance in (*((loss, 1e-3) for loss in losses), ("gradient_norm", 0.03)):
        for mine, theirs in zip(found, committed, strict=True):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance), (name, mine["step"])
    shutil.rmtree(tmp_path / "run")
