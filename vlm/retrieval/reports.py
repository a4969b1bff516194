"""What a change of an index did, and what a verification of it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vlm.retrieval.catalog import Rejection
from vlm.retrieval.ingest.planning import Plan
from vlm.retrieval.ingest.run import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a change of the index did.

    Attributes:
        num_added: New videos.
        num_updated: Videos whose file had changed and was embedded again.
        num_renamed: Videos whose file lies elsewhere now; they keep their identifiers and vectors.
        num_unchanged: Videos that were there already.
        num_removed: Videos taken out.
        num_segments: Segments embedded.
        rejected: Files that could not be indexed, with path, reason and detail.
        other_files: How many files of other kinds lay in the folders, by suffix.
        duration_s: How long it took.
        num_on_device: Videos of which a device decoded every frame, where one was asked for.
        fallbacks: Videos of which the CPU decoded frames though a device was to, by reason.
    """

    num_added: int = 0
    num_updated: int = 0
    num_renamed: int = 0
    num_unchanged: int = 0
    num_removed: int = 0
    num_segments: int = 0
    rejected: tuple[Rejection, ...] = ()
    other_files: dict[str, int] = field(default_factory=dict)
    duration_s: float = 0.0
    num_on_device: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Damage that a verification found.

    Attributes:
        name: The file, below the index folder.
        problem: What is wrong with it.
        is_derived: Whether it can be made again from the rest, without embedding anything.
    """

    name: str
    problem: str
    is_derived: bool = False


def report_of(outcome: Outcome, plan: Plan, other_files: Mapping[str, int], duration_s: float) -> Report:
    """Return the report of an addition: what was planned, and what came of it."""
    return Report(
        num_added=outcome.num_added,
        num_updated=outcome.num_updated,
        num_renamed=plan.num_renamed,
        num_unchanged=plan.num_unchanged,
        num_removed=plan.num_gone,
        num_segments=outcome.num_segments,
        rejected=tuple(outcome.rejected),
        other_files=dict(other_files),
        duration_s=duration_s,
        num_on_device=outcome.num_on_device,
        fallbacks=dict(outcome.fallbacks),
    )
