"""From a config to the objects of a run: device, tokenizer, model, objective, engine."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from typing import Any

import torch
from torch import nn

from vlm import distributed
from vlm.errors import ConfigError
from vlm.losses.masked_language import MaskingRule
from vlm.models.classifier import Classifier, EncoderConfig, EncoderModel
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextConfig, VideoTextModel
from vlm.models.weights import load_model
from vlm.models.weights.bert import load_bert
from vlm.text import Tokenizer, build_tokenizer
from vlm.training.classification import setup as classification
from vlm.training.classification.config import ClassificationConfig
from vlm.training.classification.objective import ClassificationObjective
from vlm.training.config import TrainingConfig
from vlm.training.engine import Engine, PlainEngine
from vlm.training.objective import MaskedLanguageConfig, Objective, step_seed
from vlm.training.schedule import is_ever_positive, make_optimizer
from vlm.training.sources.parts import check_shares
from vlm.training.teaching.alignment import make_alignment
from vlm.training.teaching.distillation import make_distillation

_log = logging.getLogger(__name__)

# what a model to start from can take over from the config's ``model``, and what ``load_model`` calls it
_TAKEN = {
    "vision.num_frames": "num_frames", "vision.image_size": "image_size", "vision.drop_path": "drop_path",
    "vision.independent_frames": "independent_frames", "text.dropout": "dropout",
}  # fmt: skip
_OF_REELS = ("num_frames", "image_size", "independent_frames")
# what says how random weights are drawn; and what `_prepare` decides
_OF_NEW_ONES = {"vision.init", "vision.position_std", "vision.time_std", "vision.activation_checkpointing"}


def prepare_process(config: TrainingConfig) -> torch.device:
    """Join the other processes, make arithmetic repeatable, and return this process's device.

    Raises:
        ConfigError: The batch does not divide by the number of processes, or CUDA is asked for and absent.
    """
    device = _device(config.train.device)
    if config.engine.name == "deepspeed":
        from vlm.training.deepspeed_engine import initialise_deepspeed

        initialise_deepspeed(device, config.train.timeout_s)
    else:
        distributed.initialise(device, config.train.timeout_s)
    check_shares("train.batch_size", config.train.batch_size, config.train.accumulate)
    if config.train.precision == "bf16" and device.type == "cpu" and not has_fast_bf16():
        _log.warning("this processor has no bf16 instructions: train.precision=fp32 is several times faster")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # filling fresh memory with NaN is a debugging aid that costs time
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def has_fast_bf16() -> bool:
    """Whether this processor multiplies in bf16 itself (AMX or AVX-512 BF16), or is not one of x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return any(
        bool(getattr(torch.cpu, name, lambda: True)())
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def make_tokenizer(config: TrainingConfig) -> Tokenizer | None:
    """Return the tokenizer that ``config.tokenizer`` names: ``world``, ``bert`` or a file.

    None for a run whose losses read no text.
    """
    if config.classification is not None or not config.losses.use_text:
        return None
    if config.tokenizer == "world":
        from vlm.world import vocabulary

        return build_tokenizer(vocabulary())
    if config.tokenizer == "bert":
        from vlm.text.vocabulary import bert_tokenizer

        return bert_tokenizer()
    return Tokenizer.from_file(config.tokenizer)


def make_model(
    config: TrainingConfig, tokenizer: Tokenizer | None, device: torch.device
) -> VideoTextModel | EncoderModel:
    """Return the model to train: its weights random, those of ``train.init_from``, or some of each.

    Args:
        config: Its losses decide the kind: an encoder alone if none reads text.
        tokenizer: Of the texts, None if none reads text.
        device: Where it is trained.

    Raises:
        ConfigError: ``train.init_from`` has no video encoder, or is otherwise than ``model`` says.
    """
    if config.classification is not None:
        return _make_classifier(config, config.classification).to(device).train()
    wanted = VideoTextModel if config.losses.use_text else EncoderModel
    source = config.train.init_from
    start = None if source is None else _starting_model(config, source, wanted)
    if type(start) is wanted:
        model: VideoTextModel | EncoderModel = start
        model.name, model.domain = config.name, config.domain
        model.capabilities = _with_choice(model.capabilities | abilities(config))
    else:
        torch.manual_seed(step_seed(config.seed, 0, 0))
        model = _new_model(config, tokenizer)
        if isinstance(start, EncoderModel) or (wanted is EncoderModel and isinstance(start, VideoTextModel)):
            take_encoder(model, start, str(source))
        elif start is not None:
            raise ConfigError(
                f"train.init_from: expected a model with a video encoder, got {type(start).__name__} "
                f"from {source}"
            )
    if config.train.text_from is not None:
        if model is start or not isinstance(model, VideoTextModel):
            raise ConfigError(
                "train.text_from: expected a run that makes a new text encoder; train.init_from has one "
                "already, or no loss reads text"
            )
        load_bert(model.text_encoder, config.train.text_from)
    _prepare(model, config)
    return model.to(device).train()


def _starting_model(config: TrainingConfig, source: str, wanted: type[VideoModel]) -> VideoModel:
    """Return the model to start from, which for reels takes ``model.vision``'s number of frames and size.

    There a model of short clips learns to see long ones, or as many frames each by itself. Elsewhere one that
    is trained as it is keeps its own, unless ``model`` was given others than its defaults.

    Raises:
        ConfigError: ``model`` was given what the model has otherwise and cannot take over.
    """
    start, vision = load_model(source, device="cpu"), config.model.vision
    taken: dict[str, Any] = {}
    if type(start) is wanted:
        taken = _differences(config, start)
        fixed = {name: values for name, values in taken.items() if name not in _TAKEN}
        if fixed:
            told = ", ".join(
                f"{name} {own!r}, model.{name} is {value!r}" for name, (value, own) in fixed.items()
            )
            raise ConfigError(f"train.init_from: {source} has {told}; leave these out, or say what it has")
        for name in ("num_frames", "image_size"):
            own, said = getattr(start.config.vision, name), getattr(vision, name)
            if own != said and f"vision.{name}" not in taken and config.data.source != "reels":
                _log.warning(
                    "train.init_from: %s keeps its %s %d; %d is the default", source, name, own, said
                )
    if config.data.source == "reels":
        taken |= {f"vision.{name}": (getattr(vision, name), None) for name in _OF_REELS}
    asked = {_TAKEN[name]: value for name, (value, _) in taken.items()}
    independent = asked.pop("independent_frames", None)
    frames, size = asked.pop("num_frames", None), asked.pop("image_size", None)
    try:
        if frames or size or asked:
            start = load_model(source, device="cpu", num_frames=frames, image_size=size, overrides=asked)
        if independent is not None and isinstance(start, VideoTextModel | EncoderModel):
            changed = dataclasses.replace(start.config.vision, independent_frames=independent)
            start.config = dataclasses.replace(start.config, vision=changed)
            start.vision_encoder.config = changed
    except ValueError as error:
        raise ConfigError(f"train.init_from: {source} cannot be as model says: {error}") from error
    return start


def _differences(config: TrainingConfig, start: VideoModel) -> dict[str, tuple[Any, Any]]:
    """Return name → (the config's, the model's) of what ``model`` sets otherwise than default and model.

    Nobody need say all sizes of a model that is there: what is as the defaults are may not have been said.
    """
    mine, usual, found = config.model, VideoTextConfig(), dict[str, tuple[Any, Any]]()
    parts: list[tuple[str, Any, Any, Any]] = [("vision.", mine.vision, usual.vision, start.config.vision)]
    if isinstance(start, VideoTextModel):
        parts += [("text.", mine.text, usual.text, start.config.text), ("", mine, usual, start.config)]
    for prefix, wanted, default, has in parts:
        for name in (item.name for item in dataclasses.fields(wanted)):
            value, own = getattr(wanted, name), getattr(has, name)
            if value not in (getattr(default, name), own) and f"{prefix}{name}" not in _OF_NEW_ONES:
                found[f"{prefix}{name}"] = value, own
    if config.tokenizer == "world":  # whose words decide it
        found.pop("text.vocabulary_size", None)
    return {name: values for name, values in found.items() if name not in ("vision", "text")}


def _make_classifier(config: TrainingConfig, settings: ClassificationConfig) -> Classifier:
    """Return a classifier; a model to start from is resized to its frames and size, an image's inflated."""
    vision, source, start = config.model.vision, config.train.init_from, None
    if source is not None:
        start = load_model(source, device="cpu", num_frames=vision.num_frames, image_size=vision.image_size)
    model = classification.make_classifier(
        settings, vision, start, seed=config.seed, name=config.name, domain=config.domain
    )
    if isinstance(start, VideoTextModel | EncoderModel):
        take_encoder(model, start, str(source))
    elif start is not None:
        raise ConfigError(
            f"train.init_from: expected a model with a video encoder, got {type(start).__name__} "
            f"from {source}"
        )
    _prepare(model, config)
    return model


def _prepare(model: VideoTextModel | EncoderModel, config: TrainingConfig) -> None:
    """Decide how the encoder computes, put in adapters, and stop from learning what is not to."""
    encoder, lora = model.vision_encoder, config.train.lora
    # a model to start from may have been trained otherwise
    encoder.recompute = config.model.vision.activation_checkpointing
    if config.train.compile:
        encoder.compile()
    if lora is not None:
        from vlm.training.adapters import add_adapters

        classes = config.classification
        if classes is not None and classes.head == "new":  # or it would stay at random
            lora = dataclasses.replace(lora, others=(*lora.others, "head."))
        add_adapters(model, lora, step_seed(config.seed, 0, 2))
    freeze(model, config.train.freeze)


def _new_model(config: TrainingConfig, tokenizer: Tokenizer | None) -> VideoTextModel | EncoderModel:
    """Return a model with random weights."""
    sizes, name, domain = config.model, config.name, config.domain
    if tokenizer is None:
        return EncoderModel(EncoderConfig(vision=sizes.vision), name=name, domain=domain)
    if sizes.text.vocabulary_size < tokenizer.vocabulary_size or config.tokenizer == "world":
        text = dataclasses.replace(sizes.text, vocabulary_size=tokenizer.vocabulary_size)
        sizes = dataclasses.replace(sizes, text=text)
    able = abilities(config)
    return VideoTextModel(sizes, tokenizer=tokenizer, name=name, domain=domain, capabilities=able)


def take_encoder(
    model: VideoTextModel | EncoderModel, start: VideoTextModel | EncoderModel, source: str
) -> None:
    """Give a model the weights of a trained encoder; the pooling norm and alignment heads where it has them.

    One that was of pictures had no table of times: the model's own stays.

    Raises:
        ConfigError: Sizes differ; the first weight that does not fit is named.
    """
    own, found = model.vision_encoder.state_dict(), start.vision_encoder.state_dict()
    times = "temporal_pos_embedding"
    if start.config.vision.num_frames == 1 or times in start.loaded.get("missing", ()):
        found |= {times: own[times]} if times in own else {}
    for name in sorted(own.keys() | found.keys()):
        here, there = (tuple(state[name].shape) if name in state else None for state in (own, found))
        if here != there and not (None in (here, there) and name.startswith(("pool_norm.", "clip_decoder."))):
            raise ConfigError(
                f"train.init_from: {source} has {name} of shape {there}, model.vision makes it {here}; "
                "give model.vision the sizes of that encoder"
            )
    model.vision_encoder.load_state_dict({**own, **{name: found[name] for name in own if name in found}})


def abilities(config: TrainingConfig) -> frozenset[str]:
    """Return what a model trained by ``config`` can be used for."""
    able = set[str]()
    if is_ever_positive(config.losses.contrastive.weight):
        able.add("search")
    if is_ever_positive(config.losses.matching.weight):
        able.add("rerank")
    return _with_choice(frozenset(able))


def _with_choice(able: frozenset[str]) -> frozenset[str]:
    # multiple choice weighs both scores
    return able | {"choose"} if able >= {"search", "rerank"} else able


def make_objective(
    config: TrainingConfig, model: VideoTextModel | EncoderModel
) -> Objective | ClassificationObjective:
    """Wrap the model with its losses and their teachers.

    Raises:
        ConfigError: A loss needs a part that the model or its teacher does not have.
        InvalidInput: A teacher does not exist, or does not fit.
    """
    if isinstance(model, Classifier):
        assert config.classification is not None
        return classification.make_objective(config, config.classification, model)
    masking = None
    if is_ever_positive(config.losses.masked_language.weight):
        assert isinstance(model, VideoTextModel)
        if model.text_encoder.cls is None:
            raise ConfigError(
                "losses.masked_language needs model.text.has_language_head: true, or an init_from with one"
            )
        masking = masking_rule(config.losses.masked_language, model.tokenizer)
    encoder, preprocessing, device = model.vision_encoder, model.preprocessing, model.device
    torch.manual_seed(step_seed(config.seed, 0, 1))
    return Objective(
        model,
        config.losses,
        seed=config.seed,
        masking=masking,
        alignment=make_alignment(config.losses.alignment, encoder, preprocessing, device),
        distillation=make_distillation(config.losses.distillation, encoder.config, preprocessing, device),
        autocast=config.train.precision == "bf16",
        parts=config.train.accumulate,
    )


def masking_rule(config: MaskedLanguageConfig, tokenizer: Tokenizer) -> MaskingRule:
    """Return how words are hidden.

    Raises:
        ConfigError: A preferred word is not in the vocabulary.
    """
    focus = None
    if config.words:
        focus = torch.full((tokenizer.vocabulary_size,), config.other_words)
        for word in config.words:
            unknown = tokenizer.unknown_words(word)
            if unknown:
                raise ConfigError(f"losses.masked_language.words: the tokenizer does not know {unknown[0]!r}")
            ids = tokenizer([word], max_tokens=64).input_ids[0, 1:-1]
            focus[ids] = 1.0
    return MaskingRule(
        pad_id=tokenizer.pad_id,
        start_id=tokenizer.class_id,
        mask_id=tokenizer.mask_id,
        vocabulary_size=tokenizer.vocabulary_size,
        probability=config.probability,
        focus=focus,
    )


def make_engine(config: TrainingConfig, objective: nn.Module, device: torch.device) -> Engine:
    """Return the engine that updates the objective's weights."""
    optimizer = make_optimizer(objective, config.optimizer)
    if config.engine.name == "plain":
        return PlainEngine(
            objective,
            optimizer,
            clip_norm=config.optimizer.clip_norm,
            parts=config.train.accumulate,
            saves_frozen=config.train.lora is None,
        )
    from vlm.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        objective,
        optimizer,
        device=device,
        clip_norm=config.optimizer.clip_norm,
        batch_size=config.train.batch_size,
        config=config.engine,
        parts=config.train.accumulate,
        saves_frozen=config.train.lora is None,
    )


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> list[str]:
    """Stop the parameters whose names start with one of ``prefixes`` from learning; return their names.

    Raises:
        ConfigError: A prefix fits no parameter.
    """
    frozen = []
    for prefix in prefixes:
        names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
        if not names:
            parts = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise ConfigError(f"train.freeze: no parameter starts with {prefix!r}; parts: {', '.join(parts)}")
        frozen.extend(names)
    chosen = set(frozen)
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)
    return sorted(chosen)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but no CUDA device answers; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", distributed.local_rank())
    torch.cuda.set_device(device)
    return device
