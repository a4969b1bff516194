"""The DeepSpeed engine: ZeRO 0, 1 or 2 around the same module, optimiser and numbers as the plain one.

The only module that imports deepspeed. It runs under ``torchrun`` (or alone) on gloo or NCCL. Its checkpoints
are those of the plain engine, put together from what each process holds: any number of processes, any stage
and either engine continues them. DeepSpeed's own are tied to all three, and not written to survive a kill.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm import distributed
from vlm.errors import ConfigError, MissingExtra
from vlm.training.config import EngineConfig
from vlm.training.engine import load_state, save_state
from vlm.training.schedule import set_learning_rate

# what TrainingConfig decides; a DeepSpeed file that says it too would win or lose in silence
_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "steps_per_print",
)  # fmt: skip
_MOMENTS = ("exp_avg", "exp_avg_sq")


def initialise_deepspeed(device: torch.device, timeout_s: float) -> None:
    """Join or make the process group the way DeepSpeed wants it.

    Raises:
        MissingExtra: deepspeed is not installed.
    """
    deepspeed = _import(device)
    if "RANK" not in os.environ:  # without torchrun DeepSpeed would ask for mpi4py
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    import datetime

    distributed.prepare_shutdown()
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _quiet():
        deepspeed.init_distributed(backend, timeout=datetime.timedelta(seconds=timeout_s), verbose=False)


class DeepSpeedEngine:
    """Updates a module through DeepSpeed; the interface of ``PlainEngine``.

    Args:
        module: Called by ``losses``.
        optimizer: AdamW over the module's learning parameters.
        device: Of the module.
        clip_norm: Largest global gradient norm; 0 = no clipping.
        batch_size: Clips of an update, over all processes.
        config: Which stage, and where the optimiser's state lies.
        parts: Losses that are differentiated for one update; its gradient is their mean.
        saves_frozen: Whether checkpoints hold the parameters that do not learn.

    Raises:
        MissingExtra: deepspeed is not installed.
        ConfigError: ``config.file`` contradicts what the training config decides.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        clip_norm: float,
        batch_size: int,
        config: EngineConfig,
        parts: int = 1,
        saves_frozen: bool = True,
    ) -> None:
        deepspeed = _import(device)
        self._module = module
        self._device = device
        self._clip_norm = clip_norm
        self._saves_frozen = saves_frozen
        self._stage = config.zero_stage
        self._learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._groups = optimizer.state_dict()["param_groups"]
        settings = _settings(batch_size, config, clip_norm, parts)
        distributed.broadcast_weights(module)
        with _quiet(), _without_broadcast(deepspeed):
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings
            )

    def losses(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module forward."""
        result: tuple[Tensor, dict[str, Tensor]] = self._engine(*arguments)
        return result

    def differentiate(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss to those of the update's parts before it."""
        self._engine.backward(loss)  # which divides by the number of parts
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the parts, no more

    def update(self, learning_rate: float) -> float:
        """Average over parts and processes, clip and step; return the gradient norm before clipping."""
        set_learning_rate(self._optimizer, learning_rate)
        norm: Any = None
        if not self._stage:  # stage 0 neither reports the norm nor clips by one that can be read
            norm = torch.nn.utils.clip_grad_norm_(self._learning, self._clip_norm or torch.inf)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write parameters and optimiser state as the plain engine does; every process calls this."""
        state = self._gathered_moments() if self._stage else self._optimizer.state_dict()
        save_state(folder, self._module, state, frozen=self._saves_frozen)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, here or in the plain engine, by any number of processes."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        state = load_state(folder, self._module)
        if not self._stage:
            self._optimizer.load_state_dict(state["optimizer"])
            return
        moments = state["optimizer"]["state"]
        if moments:
            self._make_moments(moments[0]["step"])
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        for index, parameter in enumerate(self._learning):
            safe_set_full_fp32_param(parameter, state["module"][names[parameter]].to(self._device))
            for name in _MOMENTS if moments else ():
                safe_set_full_optimizer_state(parameter, moments[index][name].to(self._device), name)

    def _gathered_moments(self) -> dict[str, Any]:
        """Return AdamW's state as it would be in one process; in process 0 alone it is filled."""
        from deepspeed.utils import safe_get_full_optimizer_state

        partitions = self._optimizer.optimizer.state
        state: dict[int, dict[str, Tensor]] = {}
        if partitions:  # there has been an update
            self._link_moments()
            step = next(iter(partitions.values()))["step"]
            for index, parameter in enumerate(self._learning):
                found = {name: safe_get_full_optimizer_state(parameter, name) for name in _MOMENTS}
                if distributed.is_main():
                    state[index] = {
                        "step": step.cpu().clone(),
                        **{name: v.cpu() for name, v in found.items()},
                    }
        return {"state": state, "param_groups": self._groups}

    def _make_moments(self, step: Tensor) -> None:
        """Give every partition a state to be filled, as the first update would."""
        inner = self._optimizer.optimizer
        for partition in self._optimizer.single_partition_of_fp32_groups:
            inner.state[partition] = {
                "step": step.clone().to(partition.device),
                **{name: torch.zeros_like(partition) for name in _MOMENTS},
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed know each parameter's share; by itself it does for the first group alone (0.19)."""
        self._optimizer._hp_optimizer_states_linked = False
        self._optimizer._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, and its hold on a process group."""
        self._engine.destroy()
        from deepspeed.utils import groups

        groups._WORLD_GROUP = None


def _settings(batch_size: int, config: EngineConfig, clip_norm: float, parts: int = 1) -> dict[str, Any]:
    """Merge the user's DeepSpeed file with what the training config decides.

    Raises:
        ConfigError: The file is not JSON, or sets what belongs to the training config.
    """
    extra: dict[str, Any] = {}
    file, stage = config.file, config.zero_stage
    if file is not None:
        try:
            extra = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
        twice = [key for key in extra if key in _OURS]
        if twice:
            raise ConfigError(f"{file}: {', '.join(twice)} belong into the training config, not here")
    offload = {"offload_optimizer": {"device": "cpu"}} if config.offload else {}
    zero = {"stage": stage, **offload, **extra.pop("zero_optimization", {})}
    if zero["stage"] != stage:
        raise ConfigError(f"{file}: ZeRO stage {zero['stage']} differs from engine.zero_stage {stage}")
    return {
        "train_micro_batch_size_per_gpu": batch_size // distributed.world_size() // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": clip_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **extra,
    }


def _import(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls what torch 2.13 renamed; nobody here can act on it
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise MissingExtra("deepspeed", "train", "engine.name=deepspeed") from error
    # its first use would compile a shared-memory operator for minutes; gloo serves without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's banners off stdout, which is for results."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with contextlib.redirect_stdout(None):
        try:
            yield
        finally:
            logger.setLevel(max(level, logging.WARNING))


@contextlib.contextmanager
def _without_broadcast(deepspeed: Any) -> Iterator[None]:
    """Keep DeepSpeed from sending the weights itself: it fails on a parameter without dimensions (0.19)."""
    engine = deepspeed.DeepSpeedEngine
    original = engine._broadcast_model
    engine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        engine._broadcast_model = original


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
