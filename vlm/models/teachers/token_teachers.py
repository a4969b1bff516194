"""Frozen models whose tokens a student learns from, each with its own normalisation and input size.

A teacher is no part of what is trained: it has no gradients, and no checkpoint holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from vlm.errors import InvalidInput
from vlm.models.classifier import EncoderModel
from vlm.models.teachers.frame_encoders import FrameEncoder
from vlm.models.video_mamba import VideoMamba, VideoMambaConfig
from vlm.models.video_text_model import VideoTextModel
from vlm.models.weights import load_model
from vlm.types import Preprocessing

Normalisation = Literal["own", "student"]


class TeacherOutput(NamedTuple):
    """What a teacher makes of a video.

    ``tokens`` (k, b, 1 + steps * patches, width): of its last k blocks, ascending, the class token first;
    ``attention`` (b, steps, patches): where its class token looks, or None if it has no attention.
    """

    tokens: Tensor
    attention: Tensor | None


class TokenTeacher(Protocol):
    """What training needs of a teacher.

    Attributes:
        width: Channels of its tokens.
        has_attention: Whether it says where it looks.
    """

    @property
    def width(self) -> int:
        """Channels of its tokens."""

    @property
    def has_attention(self) -> bool:
        """Whether it says where it looks."""

    def __call__(self, video: Tensor) -> TeacherOutput:
        """Look at video (b, t, 3, h, w), preprocessed for the student."""


class InputAdapter:
    """Turns a student's input into a teacher's: other statistics, other size.

    Args:
        student: How the input was made.
        teacher: What the teacher was trained on.
        normalisation: ``own``: the teacher sees its own statistics; ``student``: it sees the student's, as
            the published training did.
    """

    def __init__(
        self, student: Preprocessing, teacher: Preprocessing, normalisation: Normalisation = "own"
    ) -> None:
        self._size = teacher.image_size
        pairs = list(zip(student.mean, student.std, teacher.mean, teacher.std, strict=True))
        same = normalisation == "student" or (student.mean, student.std) == (teacher.mean, teacher.std)
        self._scale = None if same else [old / new for _, old, _, new in pairs]
        self._shift = None if same else [(old - new) / std for old, _, new, std in pairs]

    def __call__(self, video: Tensor) -> Tensor:
        """Return (b, t, 3, s, s) of (b, t, 3, h, w), resized bicubically without a low-pass, as published."""
        if self._scale is not None:
            scale = torch.tensor(self._scale, device=video.device, dtype=video.dtype)
            shift = torch.tensor(self._shift, device=video.device, dtype=video.dtype)
            video = video * scale[:, None, None] + shift[:, None, None]
        if video.shape[-2:] == (self._size, self._size):
            return video
        frames = rearrange(video, "b t c h w -> (b t) c h w")
        frames = F.interpolate(frames, (self._size, self._size), mode="bicubic", align_corners=False)
        resized: Tensor = rearrange(frames, "(b t) c h w -> b t c h w", b=len(video))
        return resized


class ClipTeacher:
    """A CLIP image tower, run on every frame by itself.

    Its tokens are those after a block, projected as the class token is at the end of the tower, but without
    the norm before that. The clip's class token is the mean of the frames'.

    Args:
        encoder: A tower of open_clip's own vision transformer.
        adapter: Makes its input.
        layers: How many of its last blocks are read.
        interval: Blocks between two that are read.
        tubelet: Frames that share a token of the student's; their middle one is looked at.

    Raises:
        InvalidInput: The tower is no plain vision transformer, or has too few blocks.

    Source: Li et al. 2023, Unmasked Teacher, section 3.1.
    """

    has_attention = True

    def __init__(
        self,
        encoder: FrameEncoder,
        adapter: InputAdapter,
        *,
        layers: int = 1,
        interval: int = 1,
        tubelet: int = 1,
    ) -> None:
        visual: Any = encoder.tower.visual
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", ())
        plain = all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks)
        if not blocks or not plain or getattr(visual, "proj", None) is None:
            raise InvalidInput(
                f"{encoder.name} cannot teach tokens: expected a plain vision transformer, such as ViT-B-16"
            )
        if (layers - 1) * interval >= len(blocks):
            raise InvalidInput(
                f"{encoder.name} has {len(blocks)} blocks: too few to read {layers}, {interval} apart"
            )
        self._visual = _frozen(visual)
        self._blocks = sorted(len(blocks) - 1 - k * interval for k in range(layers))
        self._adapter, self._tubelet = adapter, tubelet
        self.width: int = visual.proj.shape[1]
        self.grid: int = visual.grid_size[0]

    @torch.no_grad()
    def __call__(self, video: Tensor) -> TeacherOutput:
        """Look at video (b, t, 3, h, w), preprocessed for the student."""
        if video.shape[1] > 1:
            video = video[:, self._tubelet // 2 :: self._tubelet]
        frames = rearrange(self._adapter(video), "b t c h w -> (b t) c h w")
        attention = self._visual.transformer.resblocks[-1].attn
        seen: list[Tensor] = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            found = self._visual.forward_intermediates(
                frames.to(self._visual.conv1.weight.dtype),
                indices=self._blocks,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
        finally:
            hook.remove()
        patches = torch.stack(found["image_intermediates"]) @ self._visual.proj
        first = torch.stack(found["image_intermediates_prefix"]) @ self._visual.proj
        tokens = torch.cat(
            [
                reduce(first, "k (b t) 1 e -> k b 1 e", "mean", b=len(video)),
                rearrange(patches, "k (b t) n e -> k b (t n) e", b=len(video)),
            ],
            dim=2,
        )
        looks = rearrange(class_attention(attention, seen[0]), "(b t) n -> b t n", b=len(video))
        return TeacherOutput(tokens, looks)


def class_attention(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Return how much the first of ``tokens`` (b, 1 + n, d) attends to each other one: (b, n), mean of heads.

    In fp32; its share of attention to itself is left out, and the rest not brought to a sum of 1.
    """
    assert attention.in_proj_weight is not None
    width, heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
    key = F.linear(tokens, weight[width : 2 * width], None if bias is None else bias[width : 2 * width])
    query = rearrange(query.float(), "b 1 (h d) -> b h 1 d", h=heads)
    key = rearrange(key.float(), "b n (h d) -> b h d n", h=heads)
    shares = (query @ key / (width // heads) ** 0.5).softmax(dim=-1)
    mean: Tensor = reduce(shares, "b h 1 n -> b n", "mean")
    return mean[:, 1:]


class EncoderTeacher:
    """A trained encoder of this project: its normalised tokens after the last block, as they are.

    Args:
        model: A model with a video encoder; its frames, size, patches and tubelets are the student's.
        adapter: Makes its input.

    Source: Li et al. 2024, VideoMamba, section 3.3.
    """

    has_attention = False

    def __init__(self, model: EncoderModel | VideoTextModel, adapter: InputAdapter) -> None:
        self._encoder: VideoMamba = _frozen(model.vision_encoder)
        self._adapter = adapter
        self.width = self._encoder.config.width

    @torch.no_grad()
    def __call__(self, video: Tensor) -> TeacherOutput:
        """Look at video (b, t, 3, h, w), preprocessed for the student."""
        return TeacherOutput(self._encoder(self._adapter(video)).tokens[None], None)


def load_teacher(
    source: str,
    student: VideoMambaConfig,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    image_size: int | None = None,
    normalisation: Normalisation = "own",
    layers: int = 1,
    interval: int = 1,
) -> TokenTeacher:
    """Load a frozen teacher for a student.

    Args:
        source: What ``load_model`` takes: ``open_clip:ARCHITECTURE/WEIGHTS``, or a model with an encoder.
        student: Decides the places that tokens must have.
        preprocessing: How the student's input is made.
        device: Where it runs.
        image_size: Side of the teacher's input in pixels; its own if None.
        normalisation: See ``InputAdapter``.
        layers: How many of its last blocks are read.
        interval: Blocks between two that are read.

    Raises:
        InvalidInput: There is no such model, it is of a kind that cannot teach, or its tokens have other
            places than the student's.
    """
    frames = student.num_frames
    model = load_model(source, device=device, num_frames=frames, image_size=image_size)
    adapter = InputAdapter(preprocessing, model.preprocessing, normalisation)
    if isinstance(model, FrameEncoder):
        clip = ClipTeacher(model, adapter, layers=layers, interval=interval, tubelet=student.tubelet)
        _require_places(source, (student.num_steps, clip.grid), student)
        return clip
    if not isinstance(model, (EncoderModel, VideoTextModel)):
        raise InvalidInput(f"{source} is of kind {model.kind!r}, which cannot teach tokens")
    if layers > 1:
        raise InvalidInput(f"{source} teaches the tokens of its last block alone, not of {layers} blocks")
    config = model.vision_encoder.config
    _require_places(source, (config.num_steps, config.grid), student)
    return EncoderTeacher(model, adapter)


def _require_places(source: str, found: Sequence[int], student: VideoMambaConfig) -> None:
    steps, side = found
    if (steps, side) != (student.num_steps, student.grid):
        raise InvalidInput(
            f"{source} makes {steps} x {side} x {side} tokens, the student {student.num_steps} x "
            f"{student.grid} x {student.grid}; give the teacher an image_size that is its patch size times "
            f"{student.grid}, and equal tubelets"
        )


def _frozen(module: Any) -> Any:
    return module.requires_grad_(False).eval()
