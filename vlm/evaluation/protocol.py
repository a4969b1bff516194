"""What is measured, pinned in a file: which captions, which positives, which frames, which scores.

Two numbers may be compared only if their protocols are equal, field by field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from numpy.typing import ArrayLike

from vlm.assets import asset
from vlm.config import load_config
from vlm.errors import InvalidInput
from vlm.metrics import (
    Interval,
    bootstrap_class_mean,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio,
)

_FOLDER = "eval/protocols"


@dataclass(frozen=True, kw_only=True, slots=True)
class BootstrapSettings:
    """How the 95 % intervals are drawn; the unit is the video (a clip and its twin count as one)."""

    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples must be at least 100 for a 95 % interval, got {self.resamples}")

    def mean(self, values: ArrayLike, groups: ArrayLike, *, bounds: bool = True) -> Interval:
        """Return ``bootstrap_mean`` with these settings."""
        return bootstrap_mean(values, groups, resamples=self.resamples, seed=self.seed, bounds=bounds)

    def class_mean(self, values: ArrayLike, classes: ArrayLike, groups: ArrayLike) -> Interval:
        """Return ``bootstrap_class_mean`` with these settings."""
        return bootstrap_class_mean(values, classes, groups, resamples=self.resamples, seed=self.seed)

    def median(self, values: ArrayLike, groups: ArrayLike) -> Interval:
        """Return ``bootstrap_median`` with these settings."""
        return bootstrap_median(values, groups, resamples=self.resamples, seed=self.seed)

    def ratio(self, numerators: ArrayLike, denominators: ArrayLike, groups: ArrayLike) -> Interval | None:
        """Return ``bootstrap_ratio`` with these settings."""
        return bootstrap_ratio(numerators, denominators, groups, resamples=self.resamples, seed=self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring.

    Attributes:
        name: What ``--protocol`` says; equals the file's name.
        version: Raised with every change of meaning; cards of unequal versions are not compared.
        summary: One line for ``vlm eval list``.
        layout: How the annotations are written; ``world`` is the manifest of ``vlm data world``.
        captions: Queries of a clip; a world's clip has one caption, its ``first``.
        positives: ``all-true``: every clip of which the caption is true; ``strict``: its own clip only.
        recall_at: The k of R@k.
        rerank_k: How many candidates the matching head scores for each query; 0 = none.
        sampling: How frames are chosen from a clip; ``middle`` of equal spans.
        bootstrap: How intervals are drawn.
        freeze: What a generated world must be; read by its own tests, not a setting.
    """

    name: str
    version: int
    summary: str
    layout: Literal["world"]
    captions: Literal["first"] = "first"
    positives: Literal["all-true", "strict"] = "all-true"
    recall_at: tuple[int, ...] = (1, 5, 10, 50)
    rerank_k: int = 0
    sampling: Literal["middle"] = "middle"
    bootstrap: BootstrapSettings = field(default_factory=BootstrapSettings)
    freeze: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.recall_at or min(self.recall_at) < 1 or self.rerank_k < 0:
            raise ValueError(
                f"recall_at must be positive numbers and rerank_k at least 0, "
                f"got {self.recall_at} and {self.rerank_k}"
            )


def load_protocol(name: str, overrides: tuple[str, ...] = ()) -> Protocol:
    """Read a protocol by the name that ``vlm eval list`` shows.

    Raises:
        InvalidInput: There is no such protocol, or its file is not valid.
        UsageError: An override is not valid.
    """
    known = protocol_files()
    if name not in known:
        raise InvalidInput(f"no protocol {name!r}; expected one of {', '.join(known)} (see: vlm eval list)")
    protocol = load_config(Protocol, known[name], overrides)
    if protocol.name != name:
        raise InvalidInput(
            f"{known[name]}: name is {protocol.name!r}, expected {name!r} as the file is called"
        )
    return protocol


def protocol_files() -> dict[str, Path]:
    """Return name → file of every shipped protocol, sorted by name."""
    return {path.stem: path for path in sorted(asset(_FOLDER).glob("*.yaml"))}
