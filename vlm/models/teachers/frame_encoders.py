"""Image-text towers of open_clip as video encoders: frames one by one, averaged; no sense of order."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vlm.errors import CheckpointError, InvalidInput, MissingExtra
from vlm.models.video_model import VideoModel, mean_of_directions
from vlm.models.weights.files import check_storage, read_state_dict
from vlm.models.weights.official import unwrap
from vlm.types import Preprocessing, TextFeatures, TokenBatch, VideoFeatures

NUM_FRAMES = 8
_torchvision_operators: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameEncoderConfig:
    """Which tower, with which weights, at which size."""

    architecture: str
    pretrained: str
    image_size: int


class FrameEncoder(VideoModel):
    """A frozen image-text model that sees a clip as a bag of frames."""

    kind: ClassVar[str] = "frames"
    default_capabilities: ClassVar[frozenset[str]] = frozenset({"search"})
    config: FrameEncoderConfig

    def __init__(
        self,
        tower: torch.nn.Module,
        tokenizer: Any,
        config: FrameEncoderConfig,
        *,
        preprocessing: Preprocessing,
        name: str = "unnamed",
        is_cut: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__(preprocessing=preprocessing, name=name)
        self.config = config
        self.tower: Any = tower
        self._tokenizer = tokenizer
        self._is_cut = is_cut

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Encode preprocessed video (b, t, 3, h, w) of any number of frames.

        Tokens and pooled features are the frames' vectors (b, t, e); the embedding is the mean of their
        directions, not renormalised.

        Raises:
            ValueError: The shape is not that of a video of the model's size.
        """
        size = self.config.image_size
        if video.ndim != 5 or tuple(video.shape[2:]) != (3, size, size):
            raise ValueError(
                f"expected video of shape (batch, frames, 3, {size}, {size}), got {tuple(video.shape)}"
            )
        frames = rearrange(video, "b t c h w -> (b t) c h w").to(next(self.tower.parameters()).dtype)
        encoded: Tensor = rearrange(self.tower.encode_image(frames), "(b t) e -> b t e", b=len(video))
        return VideoFeatures(encoded, encoded, mean_of_directions(encoded))

    def encode_text(self, texts: list[str] | TokenBatch) -> TextFeatures:
        """Encode texts, cut at the tower's length, or ready token ids of the tower's own tokenizer."""
        ids = texts.input_ids if isinstance(texts, TokenBatch) else self._tokenizer(list(texts))
        encoded: Tensor = self.tower.encode_text(ids.to(self.device)).float()
        mask = torch.ones(len(encoded), 1, dtype=torch.int64, device=encoded.device)
        return TextFeatures(rearrange(encoded, "b e -> b 1 e"), mask, F.normalize(encoded, dim=-1))

    def count_cut(self, texts: Sequence[str]) -> int | None:
        """Return how many texts are longer than the tower reads; None if its tokenizer does not say."""
        return None if self._is_cut is None else sum(map(self._is_cut, texts))

    def unknown_words(self, text: str) -> list[str]:
        """Return nothing: the vocabulary spells every word out in bytes."""
        return []


def load_frame_encoder(
    source: str,
    *,
    weights: Path | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    overrides: object = None,
) -> FrameEncoder:
    """Build a tower with weights that are on this machine already.

    Args:
        source: ``<architecture>/<tag>``, or ``<architecture>/<path of a weights file>``.
        weights: Where the file of the tag lies, if it is known.
        num_frames: Frames to sample from a clip; 8 by default.
        image_size: Other input size than the tower's own.
        overrides: None; there is nothing to override.

    Raises:
        InvalidInput: The architecture or tag does not exist, they disagree on QuickGELU, or the weights are
            not on this machine.
        CheckpointError: The weights do not fit.
        MissingExtra: open_clip is not installed.
        ValueError: There are overrides.
    """
    if overrides:
        raise ValueError(f"open_clip models take no overrides, got {overrides}")
    open_clip = _import_open_clip()
    architecture, _, tag = source.partition("/")
    settings = _model_settings(open_clip, architecture)
    details = _pretrained_settings(open_clip, architecture, tag, settings)
    path = weights or _weights(details, source, tag)
    check_storage(unwrap(read_state_dict(path)), str(path))
    size = {} if image_size is None else {"force_image_size": image_size}
    tower = open_clip.create_model(architecture, pretrained=None, pretrained_text=False, **size)
    try:
        open_clip.load_checkpoint(tower, str(path), strict=True, weights_only=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: the weights do not fit {architecture}: {error}") from error
    side = image_size or int(settings["vision_cfg"].get("image_size", 224))
    config = FrameEncoderConfig(architecture=architecture, pretrained=tag, image_size=side)
    preprocessing = Preprocessing(
        num_frames=num_frames or NUM_FRAMES,
        image_size=side,
        resize=details.get("interpolation", "bicubic"),
        antialias=True,
        keep_aspect=details.get("resize_mode", "shortest") == "shortest",
        mean=tuple(details.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(details.get("std") or open_clip.OPENAI_DATASET_STD),
    )
    tokenizer = open_clip.get_tokenizer(architecture)

    def is_cut(text: str) -> bool:
        pieces = len(tokenizer.encode(text)) + 2  # and where it begins and ends
        return bool(pieces > tokenizer.context_length)

    return FrameEncoder(
        tower.eval(), tokenizer, config, preprocessing=preprocessing, name=architecture, is_cut=is_cut
    )


def find_weights(source: str) -> Path:
    """Return where the weights of ``<architecture>/<tag or path>`` lie.

    Raises:
        InvalidInput: There are none of that name, or they are not on this machine; the command is given.
        MissingExtra: open_clip is not installed.
    """
    open_clip = _import_open_clip()
    architecture, _, tag = source.partition("/")
    details = _pretrained_settings(open_clip, architecture, tag, _model_settings(open_clip, architecture))
    return _weights(details, source, tag)


def _weights(details: dict[str, Any], source: str, tag: str) -> Path:
    return _cached(details, source) if details else Path(tag)


def _import_open_clip() -> Any:
    prepare_torchvision()
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtra("open-clip-torch", "clip", "an open_clip model") from error
    return open_clip


def prepare_torchvision() -> None:
    """Let torchvision import beside a torch without CUDA: its wheels cannot load their operators there."""
    global _torchvision_operators
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library
        _torchvision_operators = library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _torchvision_operators.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401


def _model_settings(open_clip: Any, architecture: str) -> dict[str, Any]:
    settings = open_clip.get_model_config(architecture)
    if settings is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        raise InvalidInput(
            f"open_clip has no architecture {architecture!r}; near: {', '.join(near) or 'none'}"
        )
    text = settings.get("text_cfg", {})
    if "hf_tokenizer_name" in text or "hf_model_name" in text:
        raise InvalidInput(
            f"{architecture} needs a tokenizer from the hub, which is not supported; choose one with "
            "CLIP's own, such as ViT-B-32 or PE-Core-B-16"
        )
    return dict(settings)


def _pretrained_settings(
    open_clip: Any, architecture: str, tag: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return what open_clip knows of a tag; nothing for the path of a file."""
    details = dict(open_clip.get_pretrained_cfg(architecture, tag) or {})
    if not details:
        if tag and Path(tag).is_file():
            return {}
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise InvalidInput(f"{architecture} has no weights {tag!r}, nor is that a file; it has: {tags}")
    wants, has = bool(details.get("quick_gelu")), bool(settings.get("quick_gelu"))
    if wants != has:
        other = f"{architecture}-quickgelu" if wants else architecture.removesuffix("-quickgelu")
        raise InvalidInput(
            f"weights {tag!r} were trained {'with' if wants else 'without'} QuickGELU, but {architecture} "
            f"is {'with' if has else 'without'}: every feature would be wrong; use open_clip:{other}/{tag}"
        )
    return details


def _cached(details: dict[str, Any], source: str) -> Path:
    """Return where the weights of a tag lie in the caches of open_clip and the hub."""
    repository, _, file = str(details.get("hf_hub") or "").rpartition("/")
    if repository:
        from huggingface_hub import try_to_load_from_cache

        names = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        for name in names:
            found = try_to_load_from_cache(repository, name)
            if isinstance(found, str) and Path(found).is_file():
                return Path(found)
        command = f"hf download {repository} {names[0]}"
    else:
        url = str(details.get("url") or "")
        path = Path.home() / ".cache" / "clip" / url.rpartition("/")[2]
        if url and path.is_file():
            return path
        command = f"curl -L --create-dirs -o {path} {url}"
    raise InvalidInput(
        f"the weights of open_clip:{source} are not on this machine, and models are fetched only when asked: "
        f"{command}"
    )
