"""ReelsConfig: what the reels of a run are like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm.training.objective import LossesConfig
from vlm.training.schedule import Curve, check_curve, is_ever_positive
from vlm.world.chapters.reels import ATOMS, NUM_SCENES


@dataclass(frozen=True, kw_only=True, slots=True)
class ReelsConfig:
    """Reels of the digit world, rendered in memory, with claims about each.

    Attributes:
        split: Whose writers' digits are shown.
        num_scenes: Scenes of a reel, a number or a curve over steps: of many scenes at once nothing says
            which of them a claim is about, so learning starts with few.
        pairs: Pairs of a true and a false claim about each reel, of each kind: presence and order.
    """

    split: Literal["train", "val"] = "train"
    num_scenes: Curve = float(NUM_SCENES)
    pairs: int = 8

    def __post_init__(self) -> None:
        check_curve("data.reels.num_scenes", self.num_scenes)
        points = [self.num_scenes] if isinstance(self.num_scenes, float) else [n for _, n in self.num_scenes]
        if min(points) < 2 or max(points) > len(ATOMS) - 1 or self.pairs < 1:
            raise ValueError(
                f"data.reels: num_scenes must be 2 to {len(ATOMS) - 1} and pairs at least 1, "
                f"got {self.num_scenes} and {self.pairs}"
            )


def check_reels(losses: LossesConfig, batch_size: int, parts: int) -> None:
    """Raise ValueError unless a run can learn from reels.

    Args:
        losses: Of the run; claims are for the contrastive and the matching loss.
        batch_size: Reels of an update.
        parts: That it is computed in.
    """
    others = (losses.masked_language, losses.alignment, losses.distillation)
    if any(is_ever_positive(part.weight) for part in others) or not losses.use_text:
        raise ValueError(
            "data.source 'reels' has claims for losses.contrastive and losses.matching: set the weights of "
            "all other losses to 0, and one of these above"
        )
    if batch_size % (2 * parts):
        raise ValueError(
            "data.source 'reels' makes reels in pairs: train.batch_size must be a multiple of twice "
            f"train.accumulate, got {batch_size}"
        )
