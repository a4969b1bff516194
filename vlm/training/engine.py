"""The plain engine: backward, average over processes, clip, step, in ordinary PyTorch.

``DeepSpeedEngine`` offers the same methods; the loop knows no difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm import distributed
from vlm.training.checkpoint import load_tensors, save_tensors
from vlm.training.schedule import set_learning_rate

_STATE = "engine.pt"


class Engine(Protocol):
    """What the loop needs of an engine."""

    def losses(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module forward: the loss to differentiate, and its parts."""

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss to those of the update's parts before it."""

    def update(self, learning_rate: float) -> float:
        """Average over parts and processes, clip and step; return the gradient norm before clipping."""

    def save(self, folder: Path) -> None:
        """Write what a resume needs into ``folder``; every process calls this."""

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote."""

    def close(self) -> None:
        """Release what the engine holds."""


def save_state(folder: Path, module: nn.Module, optimizer: dict[str, Any], *, frozen: bool = True) -> None:
    """Write a checkpoint's state, in process 0: one form for every engine and number of processes.

    Args:
        folder: The checkpoint's.
        module: Its parameters and buffers are written.
        optimizer: The optimiser's state.
        frozen: Whether parameters that do not learn are written too.
    """
    if distributed.is_main():
        left_out = set() if frozen else _frozen(module)
        kept = {name: value for name, value in module.state_dict().items() if name not in left_out}
        save_tensors(folder / _STATE, {"module": kept, "optimizer": optimizer})


def load_state(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Read what ``save_state`` wrote onto the CPU, and fill the module with it.

    Frozen parameters that were left out stay as they are.
    """
    state = load_tensors(folder / _STATE)
    own = module.state_dict()
    kept = {name: own[name] for name in _frozen(module) if name not in state["module"]}
    module.load_state_dict({**kept, **state["module"]})
    return state


def _frozen(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


class PlainEngine:
    """One process, or several that average their gradients; the state is equal in all of them.

    Args:
        module: Called by ``losses``.
        optimizer: Over the module's learning parameters.
        clip_norm: Largest global gradient norm; 0 = no clipping.
        parts: Losses that are differentiated for one update; its gradient is their mean.
        saves_frozen: Whether checkpoints hold the parameters that do not learn.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float,
        parts: int = 1,
        saves_frozen: bool = True,
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._clip_norm = clip_norm
        self._parts = parts
        self._saves_frozen = saves_frozen
        self._is_fresh = True
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def losses(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module forward."""
        result: tuple[Tensor, dict[str, Tensor]] = self._module(*arguments)
        return result

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss to those of the update's parts before it."""
        if self._is_fresh:
            self._optimizer.zero_grad(set_to_none=True)
        self._is_fresh = False
        (loss / self._parts).backward()  # type: ignore[no-untyped-call]

    def update(self, learning_rate: float) -> float:
        """Average over parts and processes, clip and step; return the gradient norm before clipping."""
        set_learning_rate(self._optimizer, learning_rate)
        self._is_fresh = True
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm or torch.inf)
        if torch.isfinite(norm):  # or the weights would be lost with the step
            self._optimizer.step()
        return float(norm)

    def save(self, folder: Path) -> None:
        """Write parameters and optimiser state; process 0 writes, since all hold the same."""
        save_state(folder, self._module, self._optimizer.state_dict(), frozen=self._saves_frozen)

    def load(self, folder: Path) -> None:
        """Restore parameters and optimiser state; the number of processes may have changed."""
        state = load_state(folder, self._module)
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        """Nothing is held."""

    def _average_gradients(self) -> None:
        for parameter in self._parameters:
            if (
                parameter.grad is None
            ):  # unused this step, here or in another process: no step may depend on it
                parameter.grad = torch.zeros_like(parameter)
        if distributed.world_size() == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= distributed.world_size()
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
