"""Hits as files of their own, for whoever wants to take them elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlm.errors import DataError, InvalidInput
from vlm.progress import track
from vlm.serving.media.pool import MediaWorkers
from vlm.types import Hit

_PATIENCE_S = 600.0


def cut_hits(hits: Sequence[Hit], folder: Path | str) -> list[tuple[str, str, str]]:
    """Write each hit as an mp4 (H.264, a short side of at most 720 pixels) into a folder.

    Each begins with the frame that is on screen at the hit's start. The files are named by rank, video and
    start; the folder is made if it is not there.

    Returns:
        Path, reason and detail of each hit that could not be cut.

    Raises:
        InvalidInput: The folder holds something, or cannot be made.
    """
    place = Path(os.path.abspath(folder))
    try:
        place.mkdir(exist_ok=True)
        is_empty = not any(place.iterdir())
    except OSError as error:
        raise InvalidInput(f"{place}: cannot be used as a folder ({error.strerror})") from error
    if not is_empty:
        raise InvalidInput(f"{place}: is not empty; choose another folder")
    failures = []
    workers = MediaWorkers()
    try:
        for hit in track(hits, "cutting", unit="clip"):
            name = re.sub(r"[^\w.-]+", "-", Path(hit.path).stem)[:60].strip("-.") or "video"
            out = place / f"{hit.rank:03}-{name}-{hit.start_s:.2f}s.mp4"
            partial = out.with_suffix(".part")
            times = {"start_s": hit.start_s, "end_s": hit.end_s}
            try:
                workers.run("cut", _PATIENCE_S, path=hit.path, out=str(partial), how="transcode", **times)
                partial.rename(out)
            except DataError as error:
                partial.unlink(missing_ok=True)
                failures.append((hit.path, error.reason, str(error)))
    finally:
        workers.close()
    return failures
