"""Masked token alignment: from some of a video's tokens the student learns what a teacher sees there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.errors import ConfigError
from vlm.losses.alignment import Distance, alignment_loss
from vlm.models.masking import Kind, keep_visible, make_mask
from vlm.models.teachers.token_teachers import Normalisation, TeacherOutput, TokenTeacher, load_teacher
from vlm.models.video_mamba import EncoderOutput, VideoMamba
from vlm.training.schedule import Curve, check_curve, is_ever_positive
from vlm.types import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentConfig:
    """Masked token alignment; every other loss sees the visible tokens alone, too.

    Attributes:
        weight: Factor, a number or a curve over steps; while it is 0 videos are whole.
        teacher: ``open_clip:ARCHITECTURE/WEIGHTS``, or the folder or name of a trained model.
        teacher_size: Side of the teacher's input in pixels; its own if not set.
        normalisation: ``own``: the teacher's own statistics; ``student``: the student's, as published.
        layers: How many of the teacher's last blocks are aligned; ``model.vision.alignment_layers`` as many.
        interval: Blocks between two of them; the student's is ``model.vision.alignment_interval``.
        distance: ``l2`` as published, ``mse`` or ``smooth_l1``.
        mask: How tokens are chosen: ``attention`` keeps what the teacher looks at, ``random`` any, ``tube``
            the same places at all times, ``clip_row`` and ``frame_row`` whole rows.
        ratio: Share of a video's tokens that is dropped.
        picture_ratio: The same for pictures, which are videos of one frame; null leaves pictures whole, and
            to the other losses.
    """

    weight: Curve = 0.0
    teacher: str = ""
    teacher_size: int | None = None
    normalisation: Normalisation = "own"
    layers: int = 1
    interval: int = 1
    distance: Distance = "l2"
    mask: Kind = "attention"
    ratio: float = 0.8
    picture_ratio: float | None = 0.5

    def __post_init__(self) -> None:
        check_curve("losses.alignment.weight", self.weight)
        if is_ever_positive(self.weight) and not self.teacher:
            raise ValueError("a teacher is needed, such as open_clip:ViT-B-16-quickgelu/openai")
        if not (0 <= self.ratio < 1 and 0 <= (self.picture_ratio or 0.0) < 1):
            raise ValueError("ratio and picture_ratio must be in [0, 1)")
        if self.layers < 1 or self.interval < 1:
            raise ValueError("layers and interval must be at least 1")


@dataclass(frozen=True, slots=True)
class View:
    """What the student may see of a batch: ``mask`` (b, steps * patches), True = dropped; and the lesson."""

    mask: Tensor
    lesson: TeacherOutput


class Alignment:
    """Masks videos, and compares the student's tokens with the teacher's.

    Args:
        config: Which mask, which distance.
        teacher: Of the student's places.
        encoder: The student, with as many alignment heads as the teacher has blocks that are read.

    Raises:
        ConfigError: The encoder's heads are not those that the teacher needs, or the mask follows the
            attention of a teacher without any.
    """

    def __init__(self, config: AlignmentConfig, teacher: TokenTeacher, encoder: VideoMamba) -> None:
        vision = encoder.config
        if (vision.alignment_width, vision.alignment_layers) != (teacher.width, config.layers):
            raise ConfigError(
                f"the teacher's tokens need model.vision.alignment_width: {teacher.width} and "
                f"alignment_layers: {config.layers}, got {vision.alignment_width} and "
                f"{vision.alignment_layers}"
            )
        if config.mask == "attention" and not teacher.has_attention:
            raise ConfigError(
                f"losses.alignment.mask: {config.teacher} has no attention to follow; use random, tube, "
                "clip_row or frame_row"
            )
        self._config, self._teacher, self._encoder = config, teacher, encoder

    @property
    def keeps_time(self) -> bool:
        """Whether pooled features of masked videos keep their time steps; as published, with tubes alone."""
        return self._config.mask == "tube"

    def view(self, video: Tensor, generators: Sequence[torch.Generator]) -> View | None:
        """Ask the teacher about video (b, t, 3, h, w), and draw each clip's mask from its CPU generator.

        Returns:
            None for pictures, if they are to be seen whole.
        """
        config, vision = self._config, self._encoder.config
        is_video = video.shape[1] > 1
        ratio = config.ratio if is_video else config.picture_ratio
        if ratio is None:
            return None
        lesson = self._teacher(video)
        attention = lesson.attention.cpu() if lesson.attention is not None else None
        masks = [
            make_mask(
                config.mask,
                ratio,
                batch=1,
                num_steps=vision.num_steps if is_video else 1,
                grid=(vision.grid, vision.grid),
                attention=None if attention is None else attention[row : row + 1].float(),
                generator=generator,
            )
            for row, generator in enumerate(generators)
        ]
        return View(torch.cat(masks).to(video.device), lesson)

    def loss(self, output: EncoderOutput, view: View, num_frames: int) -> Tensor:
        """Compare what the student made of the visible tokens with the teacher's tokens at their places."""
        student = self._encoder.align(output, view.mask, num_frames)
        return alignment_loss(student, visible(view.lesson.tokens, view.mask), distance=self._config.distance)


def visible(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the visible ones of a teacher's tokens (k, b, 1 + n, e), the class token always among them."""
    kept = [torch.cat([each[:, :1], keep_visible(each[:, 1:], mask)], dim=1) for each in tokens]
    return torch.stack(kept)


def make_alignment(
    config: AlignmentConfig, encoder: VideoMamba, preprocessing: Preprocessing, device: torch.device
) -> Alignment | None:
    """Load the teacher that a config names; None if it aligns nothing.

    Raises:
        ConfigError: The encoder's heads do not fit the teacher.
        InvalidInput: There is no such teacher, or its tokens have other places than the encoder's.
    """
    if not is_ever_positive(config.weight):
        return None
    teacher = load_teacher(
        config.teacher,
        encoder.config,
        preprocessing,
        device=device,
        image_size=config.teacher_size,
        normalisation=config.normalisation,
        layers=config.layers,
        interval=config.interval,
    )
    return Alignment(config, teacher, encoder)
