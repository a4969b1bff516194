"""How results grow with the number of different frames that a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.errors import InvalidInput
from vlm.evaluation.features import Variant, few_frames
from vlm.evaluation.outcomes import Outcomes
from vlm.evaluation.protocol import Protocol

RULE = (
    "the frames that the model takes of a clip are cut into n equal spans, and every frame of a span is "
    "replaced by the span's middle one: n different frames at the full length"
)


def frame_variants(counts: Sequence[int], num_frames: int) -> dict[str, Variant]:
    """Return the alterations of clips that a curve needs; none where nothing is altered.

    Args:
        counts: Numbers of different frames.
        num_frames: How many frames the model takes.

    Raises:
        InvalidInput: A number is below 1 or above what the model takes.
    """
    wrong = [count for count in counts if not 1 <= count <= num_frames]
    if wrong:
        raise InvalidInput(
            f"--frames-curve: expected numbers from 1 to {num_frames}, the frames that the model takes, got "
            f"{', '.join(map(str, wrong))}"
        )
    return {_name(count): few_frames(count) for count in counts if count != num_frames}


def curve_section(
    counts: Sequence[int], outcomes: Outcomes, altered: Mapping[str, Outcomes], protocol: Protocol
) -> dict[str, Any]:
    """Return the card's ``frames_curve``: the embedding's results by the number of different frames.

    Args:
        counts: Numbers of different frames.
        outcomes: Of the clips as they are.
        altered: Outcomes by name of alteration, as ``frame_variants`` names them.
        protocol: What is measured.
    """
    points = []
    for count in sorted(set(counts)):
        seen = altered.get(_name(count), outcomes)
        results = seen.results(protocol.recall_at, protocol.bootstrap, kinds=("itc",))
        points.append({"frames": count, "results": results, "twins": seen.twins.get("itc", {})})
    return {"rule": RULE, "kind": "itc", "points": points}


def _name(count: int) -> str:
    return f"frames-{count}"
