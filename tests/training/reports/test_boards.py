"""Boards show what the run's own lines say; the best evaluation is kept."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from vlm.errors import MissingExtra
from vlm.models import load_model
from vlm.training.loop import train
from vlm.training.reports.boards import open_boards
from vlm.training.reports.tracking import best_value, read_lines


def test_tensorboard_shows_the_lines_also_after_a_resume(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(tiny("train.boards=[tensorboard]", "train.max_steps=4"), run)
    train(tiny("train.boards=[tensorboard]"), run, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = read_lines(run / "metrics.jsonl")
    for name in ("loss", "val/r1"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
    assert "speed/samples_per_s" in events.Tags()["scalars"]


def test_a_board_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra, match=r"train.boards needs wandb.*\[wandb\]"):
        open_boards(["wandb"], tmp_path, 0, {})


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls = []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(
            log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append("finish")
        )

    fake = SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: f"id{len(calls)}"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 4):
        (board,) = open_boards(["wandb"], tmp_path, step, {"seed": 3})
        board.add(step + 1, {"loss": 2.0})
        board.close()
    assert [call["id"] for call in calls if isinstance(call, dict)] == ["id0", "id0"]
    assert calls[0]["resume"] == "allow" and calls[0]["config"] == {"seed": 3}
    assert calls[1:3] == [(({"loss": 2.0},), {"step": 1}), "finish"]


def test_the_best_evaluation_is_kept_also_over_a_resume(tiny, tmp_path, monkeypatch):
    """Scores are given: the best of six steps is the fourth, before the run is stopped."""
    from vlm.training.validation import Validation

    given = iter([0.1, 0.7, 0.3])
    original = Validation.run
    monkeypatch.setattr(Validation, "run", lambda self: original(self) | {"pair_r1": next(given)})
    run = tmp_path / "run"
    train(tiny("evaluation.best=pair_r1", "train.max_steps=4"), run)
    fourth = load_model(run / "best").state_dict()
    train(tiny("evaluation.best=pair_r1"), run, resume=True)
    assert best_value(run / "metrics.jsonl", "val/pair_r1", 6) == 0.7
    assert best_value(run / "metrics.jsonl", "val/pair_r1", 3) == 0.1
    best, last = load_model(run / "best"), load_model(run / "model")
    assert all(value.equal(fourth[name]) for name, value in best.state_dict().items())
    assert not all(value.equal(last.state_dict()[name]) for name, value in best.state_dict().items())
    saved = load_model(run / "checkpoints" / "step-00000004" / "model").state_dict()
    assert all(value.equal(saved[name]) for name, value in best.state_dict().items())
