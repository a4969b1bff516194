"""What a protocol pins of moments: which overlaps count, and how a model's are cut out of a video."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposals:
    """How a model that only scores clips finds moments.

    Every stretch of each length is scored against the query; of stretches that overlap, the best stays.

    Attributes:
        segment_s: Lengths of the stretches, in seconds.
        stride: From one start to the next, as a share of the length.
        suppress_iou: A stretch that overlaps a better one by more than this is left out.
    """

    segment_s: tuple[float, ...] = (4.0, 8.0, 16.0)
    stride: float = 0.5
    suppress_iou: float = 0.5

    def __post_init__(self) -> None:
        if not self.segment_s or min(self.segment_s) <= 0:
            raise ValueError(f"segment_s must hold positive numbers of seconds, got {self.segment_s}")
        if not 0 < self.stride <= 1:
            raise ValueError(f"stride must be in (0, 1], as gaps would open, got {self.stride}")
        if not 0 <= self.suppress_iou <= 1:
            raise ValueError(f"suppress_iou must be in [0, 1], got {self.suppress_iou}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MomentSettings:
    """Which windows count as found.

    Attributes:
        ious: Overlaps at which recall is reported.
        mean_at: Overlaps at which average precision is reported, beside its mean over 0.5, 0.55, ..., 0.95.
        max_windows: Windows of a query that count, best first.
        lengths: Seconds up to which a true window is short, and middle.
        clip_s: Length of the clips that people rated, in seconds.
        proposals: How a model finds moments.
    """

    ious: tuple[float, ...] = (0.3, 0.5, 0.7)
    mean_at: tuple[float, ...] = (0.5, 0.75)
    max_windows: int = 10
    lengths: tuple[float, float] = (10.0, 30.0)
    clip_s: float = 2.0
    proposals: Proposals = field(default_factory=Proposals)

    def __post_init__(self) -> None:
        if not self.ious or not all(0 < level <= 1 for level in (*self.ious, *self.mean_at)):
            raise ValueError(f"ious and mean_at must be in (0, 1], got {self.ious} and {self.mean_at}")
        if self.max_windows < 1 or self.clip_s <= 0 or not 0 < self.lengths[0] < self.lengths[1]:
            raise ValueError(
                "max_windows and clip_s must be positive and lengths ascending, got "
                f"{self.max_windows}, {self.clip_s} and {self.lengths}"
            )
