"""What an editing program must know of the files that hits lie in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from vlm.retrieval.ingest.events import DecodeSettings, Failed, Opened
from vlm.retrieval.ingest.pool import decode_files
from vlm.types import Hit, Preprocessing

_USUAL_RATE = Fraction(25)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footage:
    """A file: frames a second (the mean where it varies), length in seconds, and size in pixels."""

    rate: Fraction
    duration_s: float
    width: int
    height: int

    @property
    def counted(self) -> int:
        """How many frames a second the timecode counts."""
        return max(1, round(self.rate))

    def frame_at(self, time_s: float) -> int:
        """Return the number of the frame that begins nearest to a time."""
        return max(0, round(time_s * self.rate))

    def timecode(self, frame: int) -> str:
        """Return the non-drop timecode of a frame."""
        seconds, frames = divmod(frame, self.counted)
        minutes, seconds = divmod(seconds, 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}:{frames:02}"


def look_at(hits: Sequence[Hit]) -> dict[str, Footage]:
    """Return the files' facts by path, read from them; 25 frames a second stand for those that are gone."""
    paths = list(dict.fromkeys(hit.path for hit in hits))
    settings = DecodeSettings(preprocessing=Preprocessing(), only_open=True)
    found: dict[str, Footage] = {}
    with closing(decode_files([Path(path) for path in paths], settings)) as events:
        for event in events:
            if isinstance(event, Opened):
                rate = Fraction(event.fps).limit_denominator(1001)
                found[paths[event.file]] = Footage(
                    rate=rate if rate > 0 else _USUAL_RATE,
                    duration_s=event.duration_s,
                    width=event.width,
                    height=event.height,
                )
            elif isinstance(event, Failed):
                path = paths[event.file]
                last_s = max(hit.end_s for hit in hits if hit.path == path)
                found[path] = Footage(rate=_USUAL_RATE, duration_s=last_s, width=1920, height=1080)
    return found
