"""A study does what is missing, and says what a reader would compute from its cards by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from tests.training.conftest import TINY
from vlm.assets import asset
from vlm.cli import main
from vlm.config import load_config
from vlm.errors import ConfigError, InvalidInput, UsageError, VlmError
from vlm.training.config import TrainingConfig
from vlm.training.studies.config import StudyConfig
from vlm.training.studies.curves import curve_of
from vlm.training.studies.flops import flops_of
from vlm.training.studies.runner import card_of, jobs, run_jobs
from vlm.training.studies.summary import draw_study, summarise, table


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """Two arms, the second of two stages, from two seeds."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    plan = {
        "name": "small",
        "question": "does it work",
        "seeds": [3, 5],
        "arms": {
            "one": [{"config": str(recipe), "set": ["train.max_steps=2"]}],
            "two": [{"config": str(recipe), "set": ["name=tiny-{seed}"]}, {"config": str(recipe)}],
        },
        "tests": {"test": {"split": "test", "seed": 4, "count": 3}},
        "differences": [["one", "two"]],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    return load_config(StudyConfig, path)


def write_card(folder: Path, arm: str, seed: int, above: list[int], **protocol: object) -> None:
    """Write what the summary reads of a card; a query is found if nothing ranks above it."""
    one = len(above)
    hits = sum(rank == 0 for rank in above) / one
    measures = {name: {"value": hits} for name in ("recall@1", "pair_recall@1", "direction")}
    block = {
        "above": above, "tied": [1] * one, "tied_positives": [1] * one, "num_scored": one, "num_items": one,
        "groups": [0, 0, 1, 1],
    }  # fmt: skip
    card = {
        "format": "vlm-card/1",
        "protocol": {"name": "world", "bootstrap": {"resamples": 200, "seed": 0}, **protocol},
        "model": {},
        "results": {},
        "twins": {"itc": measures},
        "per_query": {"query_to_item": {"itc": block}},
        "environment": {"machine": "x"},
    }
    path = card_of(folder, arm, seed, "test")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(card), encoding="utf-8")


def write_curve(study: StudyConfig, folder: Path, values: list[float]) -> None:
    for arm in study.arms:
        for seed in study.seeds:
            for _recipe, _changes, run in study.stages(arm, seed, folder):
                run.mkdir(parents=True, exist_ok=True)
                lines = [{"step": step, "val/r1": value} for step, value in enumerate(values, start=1)]
                text = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 2.0}, *lines])
                (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_a_study_does_what_is_missing_seed_by_seed(study: StudyConfig, tmp_path: Path) -> None:
    folder, called = tmp_path / "out", []

    def command(arguments: list[str]) -> None:
        called.append(arguments)
        if len(called) == 4:
            raise VlmError("killed")
        result = next(job.result for job in jobs(study, folder) if job.arguments == arguments)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.touch()
        if arguments[0] == "train":
            (result.parent.parent / "metrics.jsonl").touch()

    with pytest.raises(VlmError, match="killed"):
        run_jobs(study, folder, lambda _line: None, command)
    begun = folder / "runs" / "two-3-1"  # what a killed training leaves behind
    begun.mkdir()
    (begun / "config.yaml").touch()
    said: list[str] = []
    run_jobs(study, folder, said.append, command)
    kinds = [(call[0], call[-1].rsplit("/", 1)[-1]) for call in called]
    assert kinds == [
        ("data", "test"), ("train", "one-3-1"), ("eval", "one-3-test.json"), ("train", "two-3-1"),
        ("train", "two-3-1"), ("train", "two-3-2"), ("eval", "two-3-test.json"),
        ("train", "one-5-1"), ("eval", "one-5-test.json"),
        ("train", "two-5-1"), ("train", "two-5-2"), ("eval", "two-5-test.json"),
    ]  # fmt: skip
    assert "--out" in called[3] and "--resume" in called[4]
    assert f"train.init_from={begun / 'model'}" in called[5] and "seed=3" in called[5]
    assert "name=tiny-5" in called[9] and said[0] == "small: 1 of 8, two, seed 3, stage 1"
    run_jobs(study, folder, said.append, command)
    assert len(called) == 12
    with pytest.raises(VlmError, match="is not there"):
        run_jobs(study, tmp_path / "other", said.append, lambda _arguments: None)


def test_the_figures_of_a_summary(study: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no seed"):
        summarise(study, tmp_path)
    write_card(tmp_path, "one", 3, [0, 1, 1, 1])
    write_card(tmp_path, "two", 3, [0, 0, 0, 1])
    write_card(tmp_path, "one", 5, [1, 1, 0, 0])
    write_curve(study, tmp_path, [0.25, 0.5])
    assert summarise(study, tmp_path)["seeds"] == [3]
    write_card(tmp_path, "two", 5, [0, 0, 0, 1])
    result = summarise(study, tmp_path)
    row = result["arms"]["one"]["test"]["itc"]["recall@1"]
    assert row["values"] == [0.25, 0.5] and row["mean"] == 0.375
    assert row["spread"] == pytest.approx(0.125 * 2**0.5)
    (difference,) = result["differences"]
    assert difference["values"] == [0.5, 0.25] and difference["mean"] == 0.375
    # by hand: the first clip's queries gain 0.5 and 1.0, the second's 0.5 and -0.5, so samples lie between
    assert (difference["low"], difference["high"]) == (0.0, 0.75)
    assert result["curves"]["two"]["5"] == [(8, 0.25), (16, 0.5), (56, 0.25), (64, 0.5)]
    assert "| two less one | test | itc | recall@1 | +37.5 | [+0.0, +75.0] | +50.0, +25.0 |" in table(result)
    assert "| one | test | itc | 37.5 ± 17.7 |" in table(result)
    draw_study(result, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000
    write_card(tmp_path, "two", 5, [0, 0, 0, 1], gallery_sha256="other")
    with pytest.raises(InvalidInput, match="gallery_sha256"):
        summarise(study, tmp_path)


def test_cards_outlive_the_runs_that_they_measured(study: StudyConfig, tmp_path: Path) -> None:
    for arm in study.arms:
        write_card(tmp_path, arm, 3, [0, 1, 1, 1])
    write_curve(study, tmp_path, [0.25])
    before = summarise(study, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    assert summarise(study, tmp_path) == before and before["curves"]["one"]["3"] == [(8, 0.25)]
    waiting = [job.title for job in jobs(study, tmp_path) if not job.is_done]
    assert waiting[0] == "clips of test" and all("seed 5" in title for title in waiting[1:])
    # a stage of which only a later card is missing is trained again
    card_of(tmp_path, "two", 3, "test").unlink()
    waiting = [job.title for job in jobs(study, tmp_path) if not job.is_done]
    assert waiting[1:4] == [f"two, seed 3, {what}" for what in ("stage 1", "stage 2", "measured on test")]


def test_the_program(study: StudyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage really trains; then the program finds nothing left to do, and reports."""

    def command(arguments: list[str]) -> None:
        short = ["--set", "train.max_steps=2"] if arguments[0] == "train" else []
        assert main([*arguments, *short]) == 0

    run_jobs(replace(study, seeds=(3,)), tmp_path / "o", lambda _line: None, command)
    # what is measured outlives the runs, also of a study that was left before its first report
    assert all(curve_of(tmp_path / "o", arm, 3).exists() for arm in study.arms)
    shutil.rmtree(tmp_path / "o" / "runs")
    capsys.readouterr()
    arguments = ["eval", "study", str(tmp_path / "study.yaml"), "--set", "seeds=[3]"]
    arguments += ["--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "| two less one | test |" in first and first.startswith("seeds 3\n")
    assert main([*arguments, "--report"]) == 0 and capsys.readouterr().out == first
    assert main([*arguments, "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "missing" not in plan and "done    two, seed 3, stage 2" in plan and "one: " in plan
    assert json.loads((tmp_path / "o" / "study.json").read_text())["study"]["name"] == "small"
    assert (tmp_path / "o" / "study.png").exists()


def test_a_study_of_reels(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames as arms: everything is done by the program itself, and the table has both kinds of claim."""
    settings = yaml.safe_load(tiny.path.read_text())
    settings["model"]["vision"] |= {"image_size": 32, "patch_size": 16}
    settings |= {"data": {"source": "reels", "workers": 0}, "losses": {}}
    settings["train"] |= {"max_steps": 2, "batch_size": 2}
    settings["evaluation"] = {"every": 2, "clips": 2, "best": "order"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    plan = {
        "name": "frames",
        "question": "do they pay",
        "seeds": [0],
        "arms": {
            "few": [{"config": str(recipe)}],
            "bag": [{"config": str(recipe), "set": ["model.vision.num_frames=32",
                                                    "model.vision.independent_frames=true"]}],
        },
        "tests": {"test": {"measure": "reels", "count": 2}},
        "differences": [["few", "bag"]],
    }  # fmt: skip
    path, out = tmp_path / "study.yaml", tmp_path / "o"
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    study = load_config(StudyConfig, path)
    titles = [job.title for job in jobs(study, out)]
    assert titles == [
        f"{arm}, seed 0, {what}" for arm in study.arms for what in ("stage 1", "measured on test")
    ]
    assert main(["eval", "study", str(path), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| | clips | score | presence, of the best | order, of the best |" in shown
    assert (
        "| bag less few | test | itm | presence |" in shown
        and "| bag less few | test | itm | order |" in shown
    )
    result = json.loads((out / "study.json").read_text())
    few, bag = (result["arms"][arm]["test"]["itm"] for arm in ("few", "bag"))
    assert (
        bag["presence"]["ceiling"] == 1 and bag["order"]["ceiling"] == 0.5 and few["order"]["ceiling"] < 0.9
    )
    for row in (*few.values(), *bag.values()):
        assert row["low"] <= row["mean"] <= row["high"] and row["spread"] == 0
    assert 1.5 < result["operations"]["bag"] / result["operations"]["few"] < 4  # texts cost the same
    assert result["curves"]["few"]["0"][0][0] == 4 and result["curve_of"] == "order"
    assert (out / "study.png").stat().st_size > 5000 and not (out / "clips").exists()
    with pytest.raises(UsageError, match="not of combo"):
        load_config(StudyConfig, path, ["tests={test: {measure: reels, split: combo}}"])


def test_operations_are_counted(tiny) -> None:
    """The scan and the convolution by hand; a longer run in proportion; half the batch half of it."""
    changes = ["losses.masked_language.weight=0.0", "losses.matching.weight=0.0", "train.max_steps=4"]
    config = tiny(*changes)
    once = flops_of([config])
    assert flops_of([config, config]) == 2 * once
    half = flops_of([tiny(*changes, "train.batch_size=4")])
    assert 0.49 < half / once < 0.51
    from torch.utils.flop_counter import FlopCounterMode

    from vlm.ops import Branch, bidirectional_mamba
    from vlm.training.studies.flops import _formulas

    width, states, rank, length, batch = 8, 4, 2, 5, 3
    branches = []
    for _ in range(2):
        x_proj = torch.nn.Linear(width, rank + 2 * states, bias=False)
        dt_proj = torch.nn.Linear(rank, width, bias=False)
        weight, bias, dt_bias, D = torch.randn(width, 1, 4), *(torch.randn(width) for _ in range(3))
        branches.append(Branch(weight, bias, x_proj, dt_proj, dt_bias, torch.zeros(width, states), D))
    xz = torch.randn(batch, length, 2 * width, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        out = bidirectional_mamba(xz, *branches)
    tokens = batch * length
    products = 2 * tokens * 2 * width * (rank + 2 * states) + 2 * tokens * 2 * width * rank
    own = 2 * tokens * width * (7 * states + 2 * 4)
    assert counter.get_total_flops() == products + own
    with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * products + 2 * tokens * width * (21 * states + 4 * 4)


@pytest.mark.parametrize("path", sorted(asset("configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_whole(path: Path, tmp_path: Path) -> None:
    study = load_config(StudyConfig, path)
    for arm in study.arms:
        stages = study.training(arm, study.seeds[0], tmp_path)
        best = {"retrieval": "r1", "reels": "order"}
        assert {best[test.measure] for test in study.tests.values()} == {stages[-1].evaluation.best}
        assert all(isinstance(stage, TrainingConfig) for stage in stages)
    assert path.read_text().startswith(f"# vlm eval study configs/studies/{path.name} ")


def test_a_study_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    plan = {"name": "x", "question": "y", "arms": {"one": [{"config": "z"}]}, "differences": [["one", "two"]]}
    path.write_text(yaml.safe_dump(plan), encoding="utf-8")
    with pytest.raises(ConfigError, match="no arm 'two'"):
        load_config(StudyConfig, path)
    with pytest.raises(UsageError, match="seeds"):
        load_config(StudyConfig, path, ["seeds=[1, 1]", "differences=[]"])
    with pytest.raises(UsageError, match="expected one of"):
        load_config(StudyConfig, path, ["tests={t: {split: train}}", "differences=[]"])
