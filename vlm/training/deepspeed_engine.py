"""The DeepSpeed engine: ZeRO 0, 1 or 2 around the same module, optimiser and numbers as the plain one.

The only module that imports deepspeed. It runs under ``torchrun`` (or alone) on gloo or NCCL.
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
from vlm.training.schedule import set_learning_rate

# what TrainingConfig decides; a DeepSpeed file that says it too would win or lose in silence
_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "steps_per_print",
)  # fmt: skip
_TAG = "engine"


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
    """Updates a module through DeepSpeed; the interface of ``PlainEngine``."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        clip_norm: float,
        batch_size: int,
        zero_stage: int,
        file: Path | None = None,
        parts: int = 1,
    ) -> None:
        deepspeed = _import(device)
        self._clip_norm = clip_norm
        self._zero = zero_stage > 0
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        settings = _settings(batch_size, zero_stage, clip_norm, file, parts)
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
        if not self._zero:  # stage 0 neither reports the norm nor clips by one that can be read
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm or torch.inf)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write what a resume needs into ``folder``; every process writes its part."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote.

        Raises:
            ConfigError: The checkpoint was made by another number of processes or ZeRO stage.
        """
        try:
            with _quiet():
                path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        except Exception as error:
            raise ConfigError(
                f"{folder}: DeepSpeed cannot continue this checkpoint ({error}); use the same number of "
                "processes and engine.zero_stage as before"
            ) from error
        if path is None:
            raise ConfigError(f"{folder}: holds no DeepSpeed state; was it made by engine.name=plain?")

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, and its hold on a process group."""
        self._engine.destroy()
        from deepspeed.utils import groups

        groups._WORLD_GROUP = None


def _settings(
    batch_size: int, zero_stage: int, clip_norm: float, file: Path | None, parts: int = 1
) -> dict[str, Any]:
    """Merge the user's DeepSpeed file with what the training config decides.

    Raises:
        ConfigError: The file is not JSON, or sets what belongs to the training config.
    """
    extra: dict[str, Any] = {}
    if file is not None:
        try:
            extra = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read as JSON: {error}") from error
        twice = [key for key in extra if key in _OURS]
        if twice:
            raise ConfigError(f"{file}: {', '.join(twice)} belong into the training config, not here")
    zero = {"stage": zero_stage, **extra.pop("zero_optimization", {})}
    if zero["stage"] != zero_stage:
        raise ConfigError(f"{file}: ZeRO stage {zero['stage']} differs from engine.zero_stage {zero_stage}")
    return {
        "train_micro_batch_size_per_gpu": batch_size // distributed.world_size() // parts,
        "gradient_accumulation_steps": parts,
        "gradient_clipping": clip_norm if zero_stage else 0.0,
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
