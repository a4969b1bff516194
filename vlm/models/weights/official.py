"""Published VideoMamba weights into our models: forms recognised, sizes read, nothing skipped in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.classifier import Classifier, ClassifierConfig, EncoderConfig, EncoderModel
from vlm.models.patch_embedding import inflate_patches
from vlm.models.text_encoder import TextEncoderConfig
from vlm.models.video_mamba import VideoMambaConfig
from vlm.models.video_model import VideoModel
from vlm.models.video_text_model import VideoTextConfig, VideoTextModel
from vlm.models.weights.files import check_storage
from vlm.models.weights.precision import fill
from vlm.models.weights.resizing import Overrides, apply_overrides, fit_tables

WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "_orig_mod.")
WIDTH_OF_A_HEAD = 64
VISION = "vision_encoder."

# keys that published files carry and no model here needs: (pattern, why)
_IGNORED = (
    (re.compile(r"(^|\.)position_ids$"), "a constant"),
    (re.compile(r"^distill_head\."), "training only"),
    (re.compile(r"^clip_teacher\."), "training only"),
    (re.compile(r"^text_encoder\.cls\.predictions\.decoder\.(weight|bias)$"), "tied"),
)
_TIED = {
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}


OFFICIAL_STATUS = (
    "this code equals the official code on random tiny models, and by the released files' lists of keys at "
    "full size; the released files themselves were not run by this project"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What loading a published file did.

    Attributes:
        kind: Form of the file: ``image``, ``classifier``, ``masked-pretrain`` or ``retrieval``.
        matched: Names, as in the file without wrappers, that were loaded.
        missing: Allowed absences: the table of times of an image model that becomes a video model.
        unexpected: Always empty: an unexpected name is an error.
        resized: Tables and kernels that were resized, with old and new length.
        ignored: Names that no model here needs.
        num_parameters: Weights of the model, shared ones counted once.
        dtype: Type of most weights in the file; the model is fp32.
    """

    kind: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    ignored: tuple[str, ...]
    num_parameters: int
    dtype: str

    def summary(self) -> dict[str, Any]:
        """Return what a card says of it: names by number where all is well, by name where it is not."""
        return {
            "form": f"official {self.kind}",
            "status": OFFICIAL_STATUS,
            "dtype": self.dtype,
            "num_matched": len(self.matched),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "resized": list(self.resized),
            "num_ignored": len(self.ignored),
        }


def from_official(
    state_dict: Mapping[str, Any],
    *,
    num_frames: int | None = None,
    image_size: int | None = None,
    overrides: Overrides | None = None,
) -> tuple[VideoModel, LoadReport]:
    """Build the model that a published state dict belongs to.

    Args:
        state_dict: Original names, plain, nested under ``model`` or ``module``, or prefixed; tensors on any
            device, meta included (then so is the model).
        num_frames: Other number of frames than the file's; tables are resized, image kernels inflated.
        image_size: Other size than the file's.
        overrides: Settings that tensors do not tell, such as ``num_attention_heads`` (default: a head for
            every 64 channels); see ``resizing.SETTINGS``.

    Returns:
        The model in fp32, evaluating, and what was loaded.

    Raises:
        CheckpointError: This is no VideoMamba file, or names are missing, unexpected or mis-shaped.
        ValueError: An override is unknown or impossible.
    """
    tensors = unwrap(state_dict)
    check_storage(tensors, "state dict")
    form, kept, ignored = recognise(tensors)
    config = configure(form, kept)
    if isinstance(config, VideoTextConfig) and "num_attention_heads" not in (overrides or {}):
        _check_heads(config.text.width)
    try:
        config = apply_overrides(config, num_frames, image_size, overrides)
    except (ValueError, TypeError) as error:
        raise ValueError(f"impossible settings for this file: {error}") from error
    names = {name: _our_name(name, form) for name in kept}
    if len(set(names.values())) != len(names):
        raise CheckpointError("the state dict names a weight twice, as norm.weight and norm_f.weight")
    ours = {names[name]: tensor for name, tensor in kept.items()}
    with torch.device("meta"):
        model = _build(config)
    ours, resized, missing = _fit_patches(ours, config.vision)
    ours, tables, dropped = fit_tables(ours, config.vision, VISION)
    theirs = {ours_name: name for name, ours_name in names.items()}
    fill(
        model,
        ours,
        f"VideoMamba {form} file",
        shown=lambda name: theirs[name] if name in theirs else _published_name(name, form, kept),
    )
    report = LoadReport(
        kind=form,
        matched=tuple(name for name in kept if names[name] in ours),
        missing=missing,
        unexpected=(),
        resized=resized + tables,
        ignored=ignored + dropped,
        num_parameters=model.num_parameters,
        dtype=common_dtype(kept),
    )
    return model.eval(), report


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors by their plain names: outer dictionaries opened, prefixes removed.

    Raises:
        CheckpointError: Something else than tensors is inside, or two names become one.
    """
    inner: Any = state_dict
    while wrapper := next((key for key in WRAPPERS if isinstance(inner.get(key), Mapping)), None):
        inner = inner[wrapper]
    tensors: dict[str, Tensor] = {}
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"expected names and tensors in the state dict, got {key!r}: {type(value).__name__}"
            )
        name = key
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in tensors:
            raise CheckpointError(f"the state dict names {name!r} twice, once as {key!r}")
        tensors[name] = value
    return tensors


def recognise(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Return a file's form, the tensors that belong to a model, and the names that none needs.

    Raises:
        CheckpointError: This is no VideoMamba file, or tied weights differ.
    """
    ignored = tuple(name for name in tensors if any(pattern.search(name) for pattern, _ in _IGNORED))
    for name in ignored:
        twin = tensors.get(_TIED.get(name, ""))
        if name in _TIED and (twin is None or not _equal(tensors[name], twin)):
            raise CheckpointError(f"{name} is not the same as {_TIED[name]}, to which it should be tied")
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    prefix = VISION if any(name.startswith(VISION) for name in kept) else ""
    patches = kept.get(f"{prefix}patch_embed.proj.weight")
    if (
        not any(re.match(re.escape(prefix) + r"layers\.\d+\.mixer\.", name) for name in kept)
        or patches is None
    ):
        some = ", ".join(sorted(tensors)[:4]) or "nothing"
        raise CheckpointError(
            f"not a VideoMamba file: expected names such as {prefix}patch_embed.proj.weight and "
            f"{prefix}layers.0.mixer.in_proj.weight, missing here; got {some}"
        )
    if prefix:
        return "retrieval", kept, ignored
    if "head.weight" not in kept and "norm.weight" in kept:
        return "masked-pretrain", kept, ignored
    return ("image" if patches.ndim == 4 else "classifier"), kept, ignored


def configure(form: str, tensors: Mapping[str, Tensor]) -> VideoTextConfig | ClassifierConfig | EncoderConfig:
    """Read a model's configuration from the shapes of its weights.

    Raises:
        CheckpointError: A weight that tells a size is missing or mis-shaped.
    """
    shapes = _Shapes(tensors)
    try:
        if form == "masked-pretrain":
            return EncoderConfig(vision=_vision(shapes, ""))
        if form in ("image", "classifier"):
            vision = _vision(shapes, "")
            return ClassifierConfig(vision=vision, num_classes=shapes.of("head.weight", 2)[0])
        vision = _vision(shapes, VISION)
        return VideoTextConfig(
            vision=vision,
            text=_text(shapes, vision.width),
            embedding_width=shapes.of("vision_proj.weight", 2)[0],
        )
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"VideoMamba {form} file with impossible sizes: {error}") from error


class _Shapes:
    """Shapes by name; a missing or mis-shaped one is an error that names it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.names = tuple(tensors)
        self._tensors = tensors

    def of(self, name: str, *dimensions: int) -> tuple[int, ...]:
        if name not in self._tensors:
            raise CheckpointError(f"the file lacks {name}: 1 missing: {name}", missing=[name])
        shape = tuple(self._tensors[name].shape)
        if len(shape) not in dimensions:
            text = f"{name} is {shape} instead of {' or '.join(map(str, dimensions))} dimensions"
            raise CheckpointError(f"1 mis-shaped: {text}", misshaped=[text])
        return shape

    def count(self, pattern: str) -> int:
        """Return one more than the highest number in names that match; names bound it."""
        numbers = [int(found[1]) for name in self.names if (found := re.match(pattern, name))]
        count = max(numbers, default=-1) + 1
        if count > len(self.names):
            raise CheckpointError(f"names count to {count}, but there are only {len(self.names)} tensors")
        return count


def _vision(shapes: _Shapes, prefix: str) -> VideoMambaConfig:
    patches = shapes.of(f"{prefix}patch_embed.proj.weight", 4, 5)
    width, channels, patch_size = patches[0], patches[1], patches[-1]
    tubelet = patches[2] if len(patches) == 5 else 1
    positions = shapes.of(f"{prefix}pos_embed", 3)[1] - 1
    if positions < 1 or math.isqrt(positions) ** 2 != positions:
        raise CheckpointError(f"{prefix}pos_embed is mis-shaped: {positions} positions are not a square")
    time = f"{prefix}temporal_pos_embedding"
    has_times = len(patches) == 5
    mixer = f"{prefix}layers.0.mixer."
    inner, state_size = shapes.of(f"{mixer}A_log", 2)
    decoders = shapes.count(re.escape(prefix) + r"clip_decoder\.(\d+)\.")
    rank = shapes.of(f"{mixer}dt_proj.weight", 2)[1]
    return VideoMambaConfig(
        width=width,
        depth=shapes.count(re.escape(prefix) + r"layers\.(\d+)\."),
        num_frames=shapes.of(time, 3)[1] * tubelet if has_times else 1,
        image_size=math.isqrt(positions) * patch_size,
        patch_size=patch_size,
        tubelet=tubelet,
        channels=channels,
        state_size=state_size,
        conv_width=shapes.of(f"{mixer}conv1d.weight", 3)[2],
        expand=inner // width,
        dt_rank=0 if rank == math.ceil(width / 16) else rank,
        bidirectional=f"{mixer}A_b_log" in shapes.names,
        pool_norm=f"{prefix}pool_norm.weight" in shapes.names,
        alignment_width=shapes.of(f"{prefix}clip_decoder.0.head.weight", 2)[0] if decoders else 0,
        alignment_layers=max(1, decoders),
    )


def _text(shapes: _Shapes, vision_width: int) -> TextEncoderConfig:
    root = (
        "text_encoder.bert."
        if any(name.startswith("text_encoder.bert.") for name in shapes.names)
        else "text_encoder."
    )
    vocabulary, width = shapes.of(f"{root}embeddings.word_embeddings.weight", 2)
    layers = shapes.count(re.escape(root) + r"encoder\.layer\.(\d+)\.")
    crossed = [
        int(found[1])
        for name in shapes.names
        if (found := re.match(re.escape(root) + r"encoder\.layer\.(\d+)\.crossattention\.", name))
    ]
    return TextEncoderConfig(
        vocabulary_size=vocabulary,
        width=width,
        num_layers=layers,
        fusion_layer=min(crossed, default=layers),
        num_heads=1 if width % WIDTH_OF_A_HEAD else width // WIDTH_OF_A_HEAD,
        intermediate_width=shapes.of(f"{root}encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_positions=shapes.of(f"{root}embeddings.position_embeddings.weight", 2)[0],
        token_types=shapes.of(f"{root}embeddings.token_type_embeddings.weight", 2)[0],
        vision_width=vision_width,
        has_language_head=any(name.startswith("text_encoder.cls.") for name in shapes.names),
    )


def _our_name(name: str, form: str) -> str:
    """Return our name of a published one."""
    if form == "retrieval":
        if name.startswith("text_encoder.") and not name.startswith(
            ("text_encoder.bert.", "text_encoder.cls.")
        ):
            return f"text_encoder.bert.{name.removeprefix('text_encoder.')}"
        return name
    if name.startswith("head."):
        return name
    return VISION + (f"norm.{name.removeprefix('norm_f.')}" if name.startswith("norm_f.") else name)


def _published_name(name: str, form: str, tensors: Mapping[str, Tensor]) -> str:
    """Return what the published file would call one of our weights that it lacks."""
    if form == "retrieval":
        plain = any(key.startswith("text_encoder.embeddings.") for key in tensors)
        return name.replace("text_encoder.bert.", "text_encoder.") if plain else name
    name = name.removeprefix(VISION)
    return (
        f"norm_f.{name.removeprefix('norm.')}"
        if form != "masked-pretrain" and name.startswith("norm.")
        else name
    )


def _fit_patches(
    tensors: dict[str, Tensor], vision: VideoMambaConfig
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Inflate the kernels of an image model, and give it a table of times if it becomes a video model."""
    name = f"{VISION}patch_embed.proj.weight"
    if tensors[name].ndim == 5:
        return tensors, (), ()
    fitted = {**tensors, name: inflate_patches(tensors[name], vision.tubelet)}
    resized = (f"patch_embed.proj.weight: an image's -> {vision.tubelet} frame(s)",)
    time = f"{VISION}temporal_pos_embedding"
    if vision.num_frames == 1 or time in tensors:
        return fitted, resized, ()
    fitted[time] = tensors[name].new_zeros(1, vision.num_steps, vision.width)
    return fitted, resized, ("temporal_pos_embedding",)


def _build(config: VideoTextConfig | ClassifierConfig | EncoderConfig) -> VideoModel:
    if isinstance(config, VideoTextConfig):
        return VideoTextModel(config)
    if isinstance(config, ClassifierConfig):
        return Classifier(config)
    return EncoderModel(config)


def _check_heads(width: int) -> None:
    if width % WIDTH_OF_A_HEAD:
        raise CheckpointError(
            f"the text width {width} is not a multiple of {WIDTH_OF_A_HEAD}, so the number of heads "
            "is not known: pass overrides={'num_attention_heads': n}"
        )


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.device.type == "meta" or right.device.type == "meta":
        return left.shape == right.shape
    return bool(torch.equal(left, right))


def common_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Return the type that most weights have."""
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        label = str(tensor.dtype).removeprefix("torch.")
        counts[label] = counts.get(label, 0) + tensor.numel()
    return max(counts, key=lambda label: counts[label])
