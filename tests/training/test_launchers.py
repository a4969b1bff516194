"""Under a launcher: a signal saves the run, a lost process restarts all, and one command does it again."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines


def wait_for_lines(run, process, count=1, seconds=150):
    end = time.monotonic() + seconds
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{log} did not grow"
        time.sleep(0.02)


def children(pid):
    """The processes that a launcher has started."""
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(tiny, tmp_path, launch):
    run = tmp_path / "run"
    command = ["train", str(tiny.path), "--set", "evaluation.every=0", "--set", "checkpoint.every=100000"]
    command += ["--out", str(run), "--or-resume", "--set"]
    process = launch(*command, "train.max_steps=100000", processes=2)
    wait_for_lines(run, process)
    process.terminate()  # as a cluster does when the time is up; torchrun passes it on
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert f"continue with vlm train CONFIG --resume {run}" in err
    (saved,) = (run / "checkpoints").glob("step-*")
    done = json.loads((saved / "manifest.json").read_text())["step"]
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == done
    again = launch(*command, f"train.max_steps={done + 2}", processes=2)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert out.strip() == str(run / "model")
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(1, done + 3))


@pytest.mark.slow
def test_torchrun_restarts_what_lost_a_process_and_nothing_is_lost(tiny, tmp_path, launch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    command = ["train", str(tiny.path), "--set", "train.max_steps=40", "--set", "evaluation.every=0"]
    process = launch(*command, "--out", str(run), "--or-resume", processes=2, restarts=2)
    wait_for_lines(run, process, count=5)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    calm = launch(*command, "--out", str(whole), processes=2)
    calm.communicate(timeout=280)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_plan_is_printed_once_whatever_the_processes(tiny, launch):
    planned = launch("train", str(tiny.path), "--dry-run", "--set", "train.max_steps=2", processes=2)
    out, err = planned.communicate(timeout=240)
    assert planned.returncode == 0, err
    told = json.loads(out)
    assert told["processes"] == 2 and told["clips"] == 16 and told["updates"][0]["timed_clips"] == 8


def test_a_run_is_continued_if_there_is_one(tiny, tmp_path):
    run = tmp_path / "run"
    train(tiny("train.max_steps=2", "evaluation.every=0"), run, resume=None)
    train(tiny("train.max_steps=4", "evaluation.every=0"), run, resume=None)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
