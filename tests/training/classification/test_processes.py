"""Two processes and DeepSpeed learn what one plain process learns."""

import pytest
import yaml

from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train
from vlm.training.reports.tracking import read_lines

RUN = """
import sys
from pathlib import Path
from vlm import distributed
from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train

path, run, *options = sys.argv[1:]
train(load_config(TrainingConfig, path, [*options, "train.max_steps=4"]), Path(run))
train(load_config(TrainingConfig, path, options), Path(run), resume=True)
distributed.shut_down()
"""


@pytest.fixture(scope="module")
def path(tiny_path, tmp_path_factory):
    """The tiny run without drop path, whose draws differ from process to process."""
    values = yaml.safe_load(tiny_path.read_text())
    values["model"]["vision"]["drop_path"] = 0.0
    file = tmp_path_factory.mktemp("steady") / "steady.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def reference(path, tmp_path_factory):
    run = tmp_path_factory.mktemp("reference") / "run"
    train(load_config(TrainingConfig, path), run)
    return run


@pytest.fixture
def launch(ranks, path):
    """Return a function that runs the steady run, stopped and resumed, in so many processes."""

    def start(run, *options, processes, config=path):
        ranks(RUN, config, run, *options, processes=processes)

    return start


def assert_alike(run, reference):
    lines, expected = read_lines(run / "metrics.jsonl"), read_lines(reference / "metrics.jsonl")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=2e-4), (line["step"], name)


def test_two_processes_mix_and_log_as_one_does(reference, launch, tmp_path):
    launch(tmp_path / "run", processes=2)
    assert_alike(tmp_path / "run", reference)


def test_two_processes_read_files_as_one_does(files, launch, tmp_path):
    from vlm.config import dump

    config = tmp_path / "files.yaml"
    config.write_text(dump(files("model.vision.drop_path=0.0")))
    train(load_config(TrainingConfig, config), tmp_path / "one")
    launch(tmp_path / "two", processes=2, config=config)
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stage"), [(1, 0), (2, 2)])
def test_deepspeed_learns_as_the_plain_engine_does(reference, launch, tmp_path, processes, stage):
    pytest.importorskip("deepspeed")
    options = ("engine.name=deepspeed", f"engine.zero_stage={stage}")
    launch(tmp_path / "run", *options, processes=processes)
    assert_alike(tmp_path / "run", reference)
