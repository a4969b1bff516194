"""Whether the gallery was looked for in the training set: what `vlm data overlap` found, in a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.curation.overlap import FORMAT, video_stem
from vlm.errors import InvalidInput
from vlm.evaluation.card import file_sha256
from vlm.text import clean


@dataclass(frozen=True, slots=True)
class Overlap:
    """A result file of `vlm data overlap`, and the hash of its bytes."""

    report: Mapping[str, Any]
    sha256: str


def read_overlap(path: Path) -> Overlap:
    """Read what `vlm data overlap TRAIN TEST --out FILE` wrote.

    Raises:
        InvalidInput: The file is missing, or is not of that format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read as the result of an overlap check: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise InvalidInput(
            f"{path}: expected a file of format {FORMAT!r}; make one with: vlm data overlap TRAIN TEST "
            f"--out {path}"
        )
    return Overlap(report, file_sha256(path))


def leakage_section(
    overlap: Overlap | None, paths: Sequence[Path], texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what is known of the gallery's videos and captions in the training set.

    ``status`` is ``unchecked`` without an overlap check, ``partly checked`` if it did not look at (or could
    not read) every video of the gallery, else ``checked``. Of videos that are known to be shared, and of
    captions, only those of the gallery count.

    Args:
        overlap: What `vlm data overlap` found; None if nobody looked.
        paths: The files of the gallery's videos.
        texts: Its captions, where it has any.

    Raises:
        InvalidInput: The check looked at no video of the gallery.
    """
    if overlap is None:
        return {"status": "unchecked"}
    report = overlap.report
    names = [video_stem(path.name) for path in paths]
    unreadable = {video_stem(name) for name in report["unreadable"]["second"]}
    seen = {video_stem(name) for name in report["second_videos"]} - unreadable
    num_checked = sum(name in seen for name in names)
    if not num_checked:
        raise InvalidInput(
            "--overlap: the check looked at none of the gallery's videos; give vlm data overlap the test set "
            "that is evaluated, second"
        )
    shared: dict[str, set[str]] = {way: set() for way in report["by"]}
    for match in report["matches"]:
        shared[match["by"]].add(video_stem(match["second"]))
    section: dict[str, Any] = {
        "status": "checked" if num_checked == len(names) else "partly checked",
        "training_set": {"sha256": report["first_sha256"], "videos": report["num_first"]},
        "overlap_sha256": overlap.sha256,
        "videos": len(names),
        "videos_checked": num_checked,
        "videos_shared": sum(any(name in found for found in shared.values()) for name in names),
        "by": {way: sum(name in found for name in names) for way, found in shared.items()},
    }
    if texts and report["captions"] is not None:
        known = set(report["captions"]["shared"])
        section["captions"] = len(texts)
        section["captions_shared"] = sum(clean(text) in known for text in texts)
    return section
