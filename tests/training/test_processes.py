"""Two processes and DeepSpeed do what one plain process does; gathers have the true gradient."""

import pytest

from vlm.training.reports.tracking import read_lines

# gloo's threads must be gone before the interpreter is: one that waits for its lock then aborts the process
THREADS = """
import os

def threads():
    return {open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")}
"""

GATHER = """
import torch
from vlm import distributed
from vlm.losses.claims import finding_loss
from vlm.losses.contrastive import contrastive_loss
from vlm.models.patch_embedding import SharedBatchNorm

distributed.initialise()
rank, size = distributed.rank(), distributed.world_size()
assert size == 2
torch.manual_seed(0)
video, text = torch.randn(6, 3, 8), torch.randn(6, 8)
ids = torch.tensor([0, 1, 2, 0, 3, 1])  # true pairs across the processes
positives = ids[:, None] == ids[None]

def gradients(mode, videos, texts):
    leaves = [tensor.clone().requires_grad_() for tensor in (videos, texts, torch.tensor(0.07))]
    loss = contrastive_loss(leaves[0], leaves[1], leaves[2], positives, mode=mode)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]

own = slice(3 * rank, 3 * rank + 3)
loss, grads = gradients("gradient", video[own], text[own])
mean = distributed.all_sum(loss) / size
leaves = [tensor.clone().requires_grad_() for tensor in (video, text, torch.tensor(0.07))]
unit = [torch.nn.functional.normalize(leaf, dim=-1) for leaf in leaves[:2]]
logits = unit[0].mean(1) @ unit[1].T / leaves[2]
targets = positives / positives.sum(1, keepdim=True)
whole = -((logits.log_softmax(1) + logits.T.log_softmax(1)) * targets).sum(1).mean() / 2
whole.backward()
whole, expected = whole.detach(), [leaf.grad for leaf in leaves]
assert torch.allclose(mean, whole, rtol=1e-6), (mean, whole)
# a parameter's gradient is averaged over processes afterwards, so each row's must be size times its share
for mine, full in zip(grads[:2], expected[:2]):
    assert torch.allclose(mine / size, full[own], rtol=1e-4, atol=1e-7)
assert torch.allclose(distributed.all_sum(grads[2]) / size, expected[2], rtol=1e-4)
# the published gather: whole loss everywhere, remote gradient dropped: 1 / size of the true one once averaged
loss, grads = gradients("local_gradient", video[own], text[own])
assert torch.allclose(loss, whole, rtol=1e-6)
for mine, full in zip(grads[:2], expected[:2]):
    assert torch.allclose(mine, full[own], rtol=1e-4, atol=1e-7)
# without a gather each process knows its own block of the truth
loss, _ = gradients("none", video[own], text[own])
assert torch.isfinite(loss)
# claims find the videos of all processes; only some are true of any, more of them here than there
claims = torch.randn(12, 8)
truth = torch.rand(6, 12) < 0.2
truth[:, :3], truth[:, 6] = False, True
leaves = [tensor.clone().requires_grad_() for tensor in (video[:, 0], claims)]
mine = slice(6 * rank, 6 * rank + 6)
loss = finding_loss(leaves[0][own], leaves[1][mine], 0.5, truth)
loss.backward()
full = [tensor.clone().requires_grad_() for tensor in (video[:, 0], claims)]
known = truth.any(0)
targets = truth.T[known] / truth.T[known].sum(1, keepdim=True)
whole = -(((full[1] @ full[0].T / 0.5)[known]).log_softmax(1) * targets).sum(1).mean()
whole.backward()
assert torch.allclose(distributed.all_sum(loss.detach()) / size, whole.detach(), rtol=1e-6)
assert torch.allclose(leaves[0].grad[own] / size, full[0].grad[own], rtol=1e-4, atol=1e-7)
assert torch.allclose(leaves[1].grad[mine] / size, full[1].grad[mine], rtol=1e-4, atol=1e-7)
# normalising over the global batch: output, statistics and gradients of one process that holds everything
maps, weight = torch.randn(6, 4, 5, 5) + 1, torch.randn(6, 4, 5, 5)
def normalised(layer, maps, weight):
    leaf = maps.clone().requires_grad_()
    out = layer(leaf)
    (out * weight).sum().backward()
    return out.detach(), leaf.grad, layer.weight.grad
shared, usual = SharedBatchNorm(4), torch.nn.BatchNorm2d(4)
out, mine, scale = normalised(shared, maps[own], weight[own])
expected, full, whole_scale = normalised(usual, maps, weight)
assert torch.allclose(out, expected[own], atol=1e-5)
assert torch.allclose(mine, full[own], atol=1e-5)
assert torch.allclose(distributed.all_sum(scale), whole_scale, rtol=1e-4)
assert torch.allclose(shared.running_mean, usual.running_mean, atol=1e-6)
assert torch.allclose(shared.running_var, usual.running_var, atol=1e-6)
assert distributed.gather_objects(rank) == [0, 1]
assert distributed.broadcast_object("from 0" if rank == 0 else None) == "from 0"
assert distributed.all_max(rank * 5) == 5

import sys
from pathlib import Path
from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train

train(load_config(TrainingConfig, sys.argv[1]), Path(sys.argv[2]))
assert "pt_gloo_runloop" in threads()
distributed.shut_down()
assert "pt_gloo_runloop" not in threads()
"""

# train, stop after 4 of 6 steps, resume: one start of DeepSpeed for both
DEEPSPEED = """
import sys
from pathlib import Path
from vlm import distributed
from vlm.config import load_config
from vlm.training.config import TrainingConfig
from vlm.training.loop import train

path, run, stage = sys.argv[1:]
options = ["engine.name=deepspeed", f"engine.zero_stage={stage}"]
train(load_config(TrainingConfig, path, [*options, "train.max_steps=4"]), Path(run))
train(load_config(TrainingConfig, path, options), Path(run), resume=True)
assert "pt_gloo_runloop" in threads()
distributed.shut_down()
assert "pt_gloo_runloop" not in threads()
"""


def assert_equal_within_rounding(run, reference):
    """Compare every logged number; parameters differ by the order of sums only."""
    lines, expected = read_lines(run / "metrics.jsonl"), read_lines(reference / "metrics.jsonl")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name, value in other.items():
            assert line[name] == pytest.approx(value, rel=2e-4), (line["step"], name)


def test_two_processes_gather_true_gradients_and_log_what_one_logs(unbroken, tiny, tmp_path, ranks):
    ranks(THREADS + GATHER, tiny.path, tmp_path / "run", processes=2)
    assert_equal_within_rounding(tmp_path / "run", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "stage"), [(1, 0), (2, 2)])
def test_deepspeed_logs_what_the_plain_engine_logs_also_resumed(
    unbroken, tiny, tmp_path, ranks, processes, stage
):
    pytest.importorskip("deepspeed")
    ranks(THREADS + DEEPSPEED, tiny.path, tmp_path / "run", stage, processes=processes)
    assert_equal_within_rounding(tmp_path / "run", unbroken)
