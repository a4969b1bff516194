"""Token alignment: a student's tokens are drawn to those of a frozen teacher, place by place.

Shapes: k pairs of aligned blocks, b clips, n tokens that the student saw, e the teacher's width.
Source: Li et al. 2023, Unmasked Teacher, section 3.1; Li et al. 2024, VideoMamba, sections 3.3
(self-distillation) and 3.4 (masked alignment).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Distance = Literal["l2", "mse", "smooth_l1"]


def alignment_loss(
    student: Tensor, teacher: Tensor, *, distance: Distance = "l2", normalise: bool = True
) -> Tensor:
    """Return the mean distance of the student's tokens from the teacher's, in fp32.

    Args:
        student: (..., n, e); gradients reach it.
        teacher: Of the same shape; no gradient reaches it.
        distance: ``l2``: 2 - 2 <student, teacher>, for unit vectors their squared distance, as published;
            ``mse`` and ``smooth_l1``: means over channels as well.
        normalise: Make both unit vectors first, as published.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected tokens of the teacher's shape {tuple(teacher.shape)}, got {tuple(student.shape)}"
        )
    student, teacher = student.float(), teacher.detach().float()
    if normalise:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if distance == "l2":
        return (2 - 2 * (student * teacher).sum(dim=-1)).mean()
    if distance == "mse":
        return F.mse_loss(student, teacher)
    return F.smooth_l1_loss(student, teacher)
