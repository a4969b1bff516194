"""Self-distillation: a large encoder's final tokens are drawn to those of a smaller one, trained before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.losses.alignment import alignment_loss
from vlm.models.mamba_block import RMSNorm
from vlm.models.teachers.token_teachers import TokenTeacher, load_teacher
from vlm.models.video_mamba import VideoMambaConfig
from vlm.training.schedule import Curve, check_curve, is_ever_positive
from vlm.training.teaching.alignment import visible
from vlm.types import Preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Self-distillation.

    Attributes:
        weight: Factor, a number or a curve over steps; published is 1 from the first step to the last.
        teacher: The folder or name of a trained model, with the student's frames, size, patches and tubelets.
    """

    weight: Curve = 0.0
    teacher: str = ""

    def __post_init__(self) -> None:
        check_curve("losses.distillation.weight", self.weight)
        if is_ever_positive(self.weight) and not self.teacher:
            raise ValueError("a teacher is needed: the folder or name of a trained model")


class Distillation(nn.Module):
    """The head that turns a student's tokens into the teacher's width, and the loss; no saved model has it.

    Args:
        teacher: Of the student's places.
        width: Channels of the student's tokens.
        epsilon: Of the norm in front of the head.

    Source: Li et al. 2024, VideoMamba, section 3.3.
    """

    def __init__(self, teacher: TokenTeacher, width: int, epsilon: float) -> None:
        super().__init__()
        self._teacher = teacher
        self.norm = RMSNorm(width, epsilon)
        self.head = nn.Linear(width, teacher.width)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, video: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss of the student's final tokens.

        Args:
            video: (b, t, 3, h, w), as the student saw it.
            tokens: (b, 1 + visible, width), normalised, the class token first.
            mask: (b, steps * patches), True = dropped, if the student did not see all.
        """
        target = self._teacher(video).tokens
        target = target if mask is None else visible(target, mask)
        return alignment_loss(self.head(self.norm(tokens)[0]), target[-1])


def make_distillation(
    config: DistillationConfig, vision: VideoMambaConfig, preprocessing: Preprocessing, device: torch.device
) -> Distillation | None:
    """Load the teacher that a config names and make the student's head; None if nothing is distilled.

    Raises:
        InvalidInput: There is no such teacher, or its tokens have other places than the student's.
    """
    if not is_ever_positive(config.weight):
        return None
    teacher = load_teacher(config.teacher, vision, preprocessing, device=device)
    return Distillation(teacher, vision.width, vision.norm_epsilon).to(device)
