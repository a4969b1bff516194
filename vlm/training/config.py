"""TrainingConfig: the root of a training YAML; what each key decides stands in its class."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from vlm.models.video_text_model import VideoTextConfig
from vlm.training.classification.config import ClassificationConfig
from vlm.training.objective import LossesConfig
from vlm.training.reels.config import check_reels
from vlm.training.reports.boards import BoardName
from vlm.training.schedule import OptimizerConfig
from vlm.training.sources.config import DataConfig
from vlm.world import sample_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters learn instead of the weights of ``train.init_from``.

    Attributes:
        rank: Inner width of an adapter.
        alpha: An adapter's output is scaled by ``alpha / rank``.
        targets: Last names of the linear layers that get one; empty for the usual ones: ``in_proj``,
            ``x_proj``, ``x_proj_b`` and ``out_proj`` of the video encoder, ``query``, ``key`` and ``value``
            of a text encoder.
        dropout: Rate in front of an adapter.
        others: Prefixes of the names of further parameters that learn, such as ``text_proj``; the new head
            of a classifier learns in any case.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError("train.lora: rank must be at least 1 and dropout in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The loop's own numbers.

    Attributes:
        max_steps: Updates of the whole run.
        batch_size: Clips of one update, over all processes.
        accumulate: Parts that the batch is computed in, one after the other; the update goes by the mean of
            their gradients. What a loss says of a clip by itself is the same in parts. What it says of pairs
            is not: contrastive and matching negatives, minimal-pair groups, mixing and batch statistics stay
            within a part, as in a batch of ``batch_size / accumulate``.
        precision: ``fp32``; or ``bf16``: matrix products in bf16, weights and sums in fp32.
        device: ``auto``, ``cpu`` or ``cuda``.
        init_from: A model folder or checkpoint to start from; None starts from random weights. An encoder
            alone gives its weights to the video encoder. A whole model keeps its sizes: what ``model`` sets
            otherwise than both its defaults and that model is taken over where it can be, else refused.
        text_from: A BERT weights file for the text encoder to start from, unless ``init_from`` has texts.
        freeze: Prefixes of parameter names that do not learn.
        lora: Learn low-rank adapters of ``init_from`` instead of its weights; ``{}`` for the usual ones.
        compile: Compile the video encoder with ``torch.compile``: a wait at the start, for less traffic of
            memory on a GPU; no gain was measured on CPUs.
        log_every: Updates between two lines of metrics.
        boards: Where metrics are shown beside the run's own files: ``tensorboard``, ``wandb``.
        deterministic: Refuse operations without repeatable results.
        timeout_s: Seconds a process waits for the others before it gives up.
    """

    max_steps: int = 1000
    batch_size: int = 48
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init_from: str | None = None
    text_from: str | None = None
    freeze: tuple[str, ...] = ()
    lora: LoraConfig | None = None
    compile: bool = False
    log_every: int = 1
    boards: tuple[BoardName, ...] = ()
    deterministic: bool = True
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if min(self.max_steps, self.batch_size, self.log_every, self.accumulate) < 1:
            raise ValueError("train.max_steps, batch_size, accumulate and log_every must be at least 1")
        if self.lora is not None and self.init_from is None:
            raise ValueError("train.lora adapts a trained model: name one by train.init_from")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of train.accumulate {self.accumulate}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Evaluation in the course of training, on held-out clips of the world and their reversed twins.

    A classifier is evaluated on labelled clips of the world, or on all of ``classification.files.val``; a
    model that learns from reels, by claims about held-out ones.

    Attributes:
        every: Updates between two evaluations; 0 = never.
        clips: Scenes; each comes with its reversed twin, unless it has a label. Pairs of reels; each comes
            with its mirror.
        seed: Which scenes; the same in every run that is to be compared.
        best: The metric whose best evaluation is kept as ``RUN/best``; the last model is ``RUN/model``.
    """

    every: int = 250
    clips: int = 64
    seed: int = 0
    best: Literal["r1", "r5", "pair_r1", "direction", "top1", "top5", "mean_class", "presence", "order"] = (
        "r1"
    )

    def __post_init__(self) -> None:
        if self.every < 0 or self.clips < 2:
            raise ValueError("evaluation.every must not be negative and evaluation.clips at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved: every ``every`` updates and at the end; the newest ``keep`` stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 2:
            raise ValueError("checkpoint.every must be at least 1 and checkpoint.keep at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What updates the weights.

    Attributes:
        name: ``plain`` PyTorch, or ``deepspeed``.
        zero_stage: What DeepSpeed splits over the processes: 0 nothing, 1 the optimiser's state, 2 gradients
            too. Not 3, weights too: the operators and the losses read weights of other modules, which
            DeepSpeed gathers for their owners alone (tried with 0.19.8: the first backward pass fails).
        offload: Keep the optimiser's state in the host's memory, from stage 1 on.
        file: A DeepSpeed JSON for what is not in this config.
    """

    name: Literal["plain", "deepspeed"] = "plain"
    zero_stage: int = 0
    offload: bool = False
    file: str | None = None

    def __post_init__(self) -> None:
        if self.name == "plain" and (self.zero_stage or self.file or self.offload):
            raise ValueError("engine.zero_stage, offload and file need engine.name 'deepspeed'")
        if self.offload and not self.zero_stage:
            raise ValueError("engine.offload needs engine.zero_stage 1 or 2")
        if self.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage 3 splits the weights, which the scan operator and the losses need whole; "
                "use 2, with engine.offload if memory is short: weights are a quarter of what AdamW keeps"
            )
        if not 0 <= self.zero_stage <= 2:
            raise ValueError(f"engine.zero_stage must be 0, 1 or 2, got {self.zero_stage}")


_METRICS = {
    "clips": ("r1", "r5", "pair_r1", "direction"),
    "classes": ("top1", "top5", "mean_class"),
    "reels": ("presence", "order"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """A training run.

    Attributes:
        seed: Every random number of the run follows from it.
        name: The trained model's short name.
        domain: What the trained model knows, such as ``open`` or ``digit-world``.
        tokenizer: ``world`` (the digit world's words), ``bert`` (bert-base-uncased), or a file. With
            ``world`` the vocabulary decides ``model.text.vocabulary_size``.
        model: Sizes of the model.
        data: Where clips come from.
        losses: What is learned from them.
        classification: Labels and their loss, if a classifier is trained instead of a video-text model.
        optimizer: AdamW and its schedule.
        train: The loop's own numbers.
        evaluation: Evaluation in the course of training.
        checkpoint: When the state is saved.
        engine: What updates the weights.
    """

    seed: int = 0
    name: str = "model"
    domain: str = "open"
    tokenizer: str = "bert"
    model: VideoTextConfig = field(default_factory=VideoTextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    classification: ClassificationConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: RunConfig = field(default_factory=RunConfig)
    evaluation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        reels = self.classification is None and self.data.source == "reels"
        named = _METRICS["classes" if self.classification is not None else "reels" if reels else "clips"]
        if self.evaluation.every and self.evaluation.best not in named:
            raise ValueError(
                "evaluation.best must be top1, top5 or mean_class for a classifier, presence or order where "
                "data.source is 'reels', and r1, r5, pair_r1 or direction for other models, got "
                f"{self.evaluation.best}"
            )
        if self.classification is not None:
            self._check_classification(self.classification)
            return
        if reels:
            check_reels(self.losses, self.train.batch_size, self.train.accumulate)
        self.losses.check(self.train.max_steps)
        if reels:
            return
        if self.data.has_pictures:
            self.losses.check_pictures(self.train.max_steps)
        if self.evaluation.every and not self.losses.use_text:
            raise ValueError(
                "evaluation.every must be 0 where no loss reads text: there is nothing to search"
            )
        if self.data.source == "world" or self.evaluation.every:
            self._check_world("data.source: shards and evaluation.every: 0")

    def _check_classification(self, classification: ClassificationConfig) -> None:
        if self.evaluation.every and not classification.can_evaluate:
            raise ValueError("evaluation.every must be 0 where classification.files.val names no videos")
        if self.train.text_from is not None:
            raise ValueError("train.text_from: a classifier reads no text")
        if classification.source == "world":
            self._check_world("classification.source: files")

    def _check_world(self, otherwise: str) -> None:
        try:
            sample_frames(self.model.vision.num_frames)
        except ValueError as error:
            raise ValueError(
                f"model.vision.num_frames: clips of the digit world do not fit: {error}; change it, or "
                f"set {otherwise}"
            ) from error


# what may differ between a run and its continuation: nothing that changes what is learned
_FREE = {
    "train.max_steps", "train.log_every", "train.boards", "train.timeout_s", "data.workers", "data.prefetch",
    "data.shards.cache", "data.shards.cache_gb", "data.shards.max_bad_fraction",
    "evaluation.every", "checkpoint.every", "checkpoint.keep", "classification.files.max_bad_fraction",
    "engine.name", "engine.zero_stage", "engine.offload",
}  # fmt: skip


def forbidden_changes(before: TrainingConfig, now: TrainingConfig) -> list[str]:
    """Return ``key: old -> new`` for each difference that a continued run must not have."""
    changes = [(key, old, new) for key, old, new in _differences(before, now, "") if key not in _FREE]
    if before.optimizer.decay_steps is None and before.train.max_steps != now.train.max_steps:
        old, new = before.train.max_steps, now.train.max_steps
        changes.append(("train.max_steps (it ends the decay, as optimizer.decay_steps is not set)", old, new))
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in changes]


def _differences(before: Any, now: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for item in fields(before):
        old, new = getattr(before, item.name), getattr(now, item.name)
        key = f"{prefix}{item.name}"
        if is_dataclass(old) and is_dataclass(new):
            found.extend(_differences(old, new, f"{key}."))
        elif old != new:
            found.append((key, old, new))
    return found
