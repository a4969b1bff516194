"""A batch in parts: the mean of the parts' gradients, the same clips, and a resume to the bit."""

import pytest
import torch

from vlm.errors import ConfigError, UsageError
from vlm.models import load_model
from vlm.training.loop import build, train
from vlm.training.reports.tracking import read_lines
from vlm.training.setup import make_model, make_tokenizer, prepare_process
from vlm.training.sources.opening import open_source
from vlm.training.sources.parts import in_parts

CPU = torch.device("cpu")


def labelled(*overrides):
    """Overrides that train a classifier, whose loss says nothing of pairs."""
    return ("classification={label_smoothing: 0.1}", "evaluation.best=top1", *overrides)


def parameters(config, run):
    train(config, run)
    return torch.cat([p.flatten() for p in load_model(run / "model", device="cpu").parameters()])


@pytest.mark.parametrize("parts", [2, 4])
def test_a_loss_of_single_clips_is_that_of_the_whole_batch(tiny, tmp_path, parts):
    whole = parameters(tiny(*labelled()), tmp_path / "whole")
    divided = parameters(tiny(*labelled(f"train.accumulate={parts}")), tmp_path / "parts")
    assert (whole - divided).norm() <= 1e-5 * whole.norm()
    lines, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_a_loss_of_pairs_is_the_mean_of_the_parts_each_by_itself(tiny, tmp_path):
    config = tiny("train.accumulate=2", "optimizer.clip_norm=0")
    state = build(config, tmp_path, CPU)
    with open_source(config, state.model, 1) as batches:
        parts = [next(batches), next(batches)]
    assert [batch.positives.shape for batch in parts] == [(4, 4), (4, 4)]
    gradients, losses = [], []
    for number, batch in enumerate(parts, 2):
        loss, _ = state.module(batch, number)
        learning = [p for p in state.module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, learning, allow_unused=True)
        gradients.append(
            torch.cat(
                [(g if g is not None else p * 0).flatten() for g, p in zip(found, learning, strict=True)]
            )
        )
        losses.append(loss.item())
    values = state.update(parts, 1, 0)
    mean = (gradients[0] + gradients[1]) / 2
    assert values["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert values["gradient_norm"] == pytest.approx(mean.norm().item(), rel=1e-5)
    own = torch.cat([p.grad.flatten() for p in learning])
    assert (own - mean).norm() <= 1e-6 * mean.norm()


def test_the_clips_of_an_update_and_its_curves_do_not_depend_on_the_parts(tiny):
    curve = "data.world.grouped=[[0, 0], [2, 0.5]]"
    whole, split = tiny(curve), in_parts(tiny(curve, "train.accumulate=2"))
    assert split.train.batch_size == 4 and split.train.max_steps == 12
    assert split.data.world.grouped == ((0, 0.0), (4, 0.5))
    config = tiny("data.world.grouped=0")
    model = make_model(config, make_tokenizer(config), CPU)
    with open_source(config, model, 1) as batches:
        keys = next(batches).keys
    with open_source(tiny("data.world.grouped=0", "train.accumulate=4"), model, 1) as batches:
        assert [key for _ in range(4) for key in next(batches).keys] == list(keys)
    assert in_parts(whole) is whole


def test_curves_of_weights_go_by_updates(tiny, tmp_path):
    config = tiny("train.accumulate=2", "losses.matching.weight=[[2, 0], [3, 1]]")
    module = build(config, tmp_path, CPU).module
    with open_source(config, module.model, 0) as batches:
        batch = next(batches)
    assert ["matching" in module(batch, number)[1] for number in (3, 4, 5, 6)] == [False, False, False, True]
    one, other = (module(batch, number)[0].item() for number in (6, 7))
    assert one != other  # the parts of an update hide other words


def test_a_run_in_parts_resumes_to_the_bit(tiny, tmp_path):
    settings = ("train.accumulate=2", "data.world.grouped=[[0, 0], [4, 0.5]]")
    train(tiny(*settings), tmp_path / "whole")
    train(tiny(*settings, "train.max_steps=2"), tmp_path / "broken")
    train(tiny(*settings), tmp_path / "broken", resume=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    with pytest.raises(ConfigError, match="train.accumulate: 2 -> 4"):
        train(tiny("train.accumulate=4", settings[1]), tmp_path / "broken", resume=True)


def test_batches_that_do_not_split_are_refused(tiny, monkeypatch):
    with pytest.raises(UsageError, match="batch_size 8 is not a multiple of train.accumulate 3"):
        tiny("train.accumulate=3")
    monkeypatch.setattr("vlm.distributed.world_size", lambda: 4)
    with pytest.raises(ConfigError, match="not a multiple of the 4 processes in each of 4 parts"):
        prepare_process(tiny("train.accumulate=4"))
