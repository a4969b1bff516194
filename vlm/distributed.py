"""Processes that train together: rank and size, gathers with gradients; no-ops in a single process.

Everything is explicit and equal-sized: each process holds the same number of rows of the global batch.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

DEFAULT_TIMEOUT_S = 600.0


def initialise(device: torch.device | str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
    """Join the process group that ``torchrun`` describes in the environment; do nothing without one.

    Args:
        device: The device that tensors of collectives lie on; NCCL for CUDA, gloo otherwise.
        timeout_s: Seconds after which a collective that a process does not join raises, instead of hanging.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    prepare_shutdown()
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store over restarts, and gloo would call where killed processes listened; only on
        # one machine do all processes agree on the number of restarts
        store = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def prepare_shutdown() -> None:
    """Make sure, before a process group exists, that it can be left whole, and is at the latest at exit.

    Gloo's threads take the interpreter's lock to let go of tensors. One that still runs while the interpreter
    goes down aborts the process, after all work is done; leaving the group joins them, unless something else
    keeps it.
    """
    # its functions take the group of the moment as a default, and an optimiser's first step would import it
    importlib.import_module("torch.distributed.nn.functional")
    atexit.register(shut_down)


def shut_down() -> None:
    """Leave the process group, if there is one, and wait for its threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # an engine's cycles of references may hold the group


def rank() -> int:
    """Return this process's number, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's number on its machine, which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this process writes the files and speaks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Return process 0's ``value`` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the ``value`` of every process, in rank order, in every process."""
    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def broadcast_weights(module: nn.Module) -> None:
    """Give every process the parameters and buffers of process 0."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def all_sum(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over the processes; no gradient flows through it."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_max(value: int) -> int:
    """Return the largest ``value`` of the processes."""
    values: list[int] = gather_objects(value)
    return max(values)


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the processes' tensors along dimension 0, with the true gradient.

    The backward pass sums what every process's loss says about this process's rows. With gradients averaged
    over processes afterwards, the mean of the processes' losses is thus differentiated exactly.

    Args:
        tensor: (rows, ...); the same shape in every process.

    Returns:
        (world_size * rows, ...), rows in rank order.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor, True)  # type: ignore[no-untyped-call]
    return gathered


def gather_local_gradient(tensor: Tensor) -> Tensor:
    """Concatenate like ``gather``, but keep only this process's own loss in the backward pass.

    This is the published VideoMamba training code's behaviour: after averaging over processes the gradient
    of a contrastive loss is 1 / world_size of the true one.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor, False)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sum_gradients: bool) -> Tensor:
        ctx.sum_gradients = sum_gradients
        ctx.rows = tensor.shape[0]
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        if ctx.sum_gradients:
            gradient = gradient.contiguous().clone()
            dist.all_reduce(gradient)
        start = rank() * ctx.rows
        return gradient[start : start + ctx.rows], None
