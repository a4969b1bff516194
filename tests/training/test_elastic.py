"""A run goes on with another number of processes or another engine, and learns the same."""

import pytest
import torch

from vlm.config import load_config
from vlm.training.checkpoint import load_tensors
from vlm.training.config import TrainingConfig
from vlm.training.loop import train

RUN = """
import sys
from pathlib import Path
from vlm import distributed
from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.sources import world

keys, original = [], world.to_batch

def noted(raw, model, rank):
    keys.extend(distributed.gather_objects(raw.keys))
    return original(raw, model, rank)

world.to_batch = noted
path, run, resume, *options = sys.argv[1:]
train(load_config(TrainingConfig, path, options), Path(run), resume=resume == "resume")
if distributed.is_main():
    with open(f"{run}/clips.txt", "a") as log:
        log.writelines(f"{key}\\n" for part in keys for key in part)
distributed.shut_down()
"""
# how far rounding carries two runs apart goes by the rate; this one is the default
RATE = "optimizer.learning_rate=5.0e-4"
# neither a moving average nor evaluation: what is compared is the state that learns
PLAIN = ("optimizer.ema_decay=0", "evaluation.every=0", "checkpoint.every=100")
DEEPSPEED = {"plain": (), **{
    f"zero {stage}{' offloaded' if offload else ''}": (
        "engine.name=deepspeed", f"engine.zero_stage={stage}", f"engine.offload={str(offload).lower()}"
    )
    for stage, offload in ((0, False), (1, False), (2, True))
}}  # fmt: skip


@pytest.fixture
def start(tiny, ranks):
    """Return a function that trains up to a step in so many processes."""

    def run(folder, steps, processes, *options, resume):
        options = (*PLAIN, f"train.max_steps={steps}", *options)
        ranks(RUN, tiny.path, folder, "resume" if resume else "new", *options, processes=processes)

    return run


def state_of(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_tensors(newest / "engine.pt")


def flat(state):
    """Weights and AdamW's averages, each as one vector."""
    moments = state["optimizer"]["state"]
    return {
        "weights": torch.cat([tensor.flatten() for tensor in state["module"].values()]),
        **{
            name: torch.cat([moments[index][name].flatten() for index in sorted(moments)])
            for name in ("exp_avg", "exp_avg_sq")
        },
    }


def distances(run, other):
    one, two = flat(state_of(run)), flat(state_of(other))
    return {name: ((one[name] - two[name]).norm() / two[name].norm()).item() for name in two}


@pytest.fixture(scope="module")
def unbroken_for(tmp_path_factory):
    """Return a function that gives a whole run of the plain engine in one process."""
    made = {}

    def run(path, steps):
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("whole") / "run"
            train(load_config(TrainingConfig, path, [*PLAIN, f"train.max_steps={steps}"]), made[steps])
        return made[steps]

    return run


@pytest.mark.slow
def test_two_processes_then_one_then_two_learn_what_one_learns(start, tmp_path):
    run, whole, last = tmp_path / "run", tmp_path / "whole", 60
    start(run, last // 3, 2, RATE, resume=False)
    start(run, 2 * last // 3, 1, RATE, resume=True)
    start(run, last, 2, RATE, resume=True)
    start(whole, last, 1, RATE, resume=False)
    assert (run / "clips.txt").read_bytes() == (whole / "clips.txt").read_bytes()
    assert len((run / "clips.txt").read_text().splitlines()) == last * 8
    found = distances(run, whole)
    assert found["weights"] <= 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("engine", list(DEEPSPEED)[1:])
def test_deepspeed_saves_what_the_plain_engine_saves_and_either_goes_on(
    engine, start, tiny, tmp_path, unbroken_for
):
    pytest.importorskip("deepspeed")
    run, options = tmp_path / "run", DEEPSPEED[engine]
    start(run, 3, 2, *options, resume=False)
    found = distances(run, unbroken_for(tiny.path, 3))
    assert max(found.values()) <= 1e-5, found
    start(run, 5, 1, *options, resume=True)  # fewer processes
    start(run, 7, 1, resume=True)  # the plain engine
    start(run, 8, 2, *options, resume=True)  # and back
    found = distances(run, unbroken_for(tiny.path, 8))
    assert max(found.values()) <= 2e-5, found
    assert {float(each["step"]) for each in state_of(run)["optimizer"]["state"].values()} == {8.0}


@pytest.mark.slow
def test_a_partitioned_run_in_parts_resumes_to_the_bit(start, tmp_path):
    pytest.importorskip("deepspeed")
    options = ("engine.name=deepspeed", "engine.zero_stage=2", "train.accumulate=2")
    start(tmp_path / "whole", 5, 2, *options, resume=False)
    start(tmp_path / "broken", 2, 2, *options, resume=False)
    start(tmp_path / "broken", 5, 2, *options, resume=True)
    one, other = (flat(state_of(tmp_path / name)) for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)
