"""Hits as CSV, as a CMX 3600 edit decision list, and as FCPXML 1.9."""

from __future__ import annotations

import csv
import io
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.retrieval.durability import write_bytes_durably
from vlm.retrieval.exports.footage import Footage, look_at
from vlm.types import Hit

_COLUMNS = ("rank", "video_id", "path", "start_s", "end_s", "score", "score_kind", "strength", "warning")
# what editing programs expect a sequence to begin at
_FIRST_HOUR_S = 3600


def export_hits(hits: Sequence[Hit], path: Path | str, title: str) -> None:
    """Write hits into a new file; its suffix, one of `FORMATS`, says how.

    Args:
        hits: The best first.
        path: A file that is not there yet.
        title: What was looked for.

    Raises:
        InvalidInput: The file exists, its folder does not, or the suffix is unknown.
        NoSpaceError: The disk is full.
    """
    place = Path(os.path.abspath(path))
    make = FORMATS.get(place.suffix.lower())
    if make is None:
        raise InvalidInput(f"{place.name}: expected a name that ends with {', '.join(FORMATS)}")
    if os.path.lexists(place):
        raise InvalidInput(f"{place}: exists; choose another name")
    if not place.parent.is_dir():
        raise InvalidInput(f"{place.parent}: no such folder")
    write_bytes_durably(place, make(hits, " ".join(_text(title).split()) or "search"))


def _table(hits: Sequence[Hit], title: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow((*_COLUMNS, "query"))
    for hit in hits:
        values = [getattr(hit, name) for name in _COLUMNS]
        writer.writerow([_text(value) if isinstance(value, str) else value for value in (*values, title)])
    return stream.getvalue().encode()


def _edit_list(hits: Sequence[Hit], title: str) -> bytes:
    """One event for each hit, one after the other; source times count the frames of the hit's own file."""
    footage = look_at(hits)
    lines = [f"TITLE: {title[:70]}", "FCM: NON-DROP FRAME", ""]
    sequence = next(iter(footage.values())) if footage else None
    record = _FIRST_HOUR_S * sequence.counted if sequence else 0
    for number, hit in enumerate(hits, start=1):
        assert sequence is not None
        file = footage[hit.path]
        first, last = _frames(hit, file)
        length = max(1, round(Fraction(last - first) / file.rate * sequence.rate))
        times = [file.timecode(first), file.timecode(last)]
        times += [sequence.timecode(record), sequence.timecode(record + length)]
        name = " ".join(_text(os.path.basename(hit.path)).split())
        lines += [
            f"{number:03}  AX       V     C        {' '.join(times)}",
            f"* FROM CLIP NAME: {name}",
            f"* SOURCE FILE: {' '.join(_text(hit.path).split())}",
            f"* LOC: {times[2]} RED     {_label(hit)}",
            "",
        ]
        record += length
    return "\n".join(lines).encode()


def _final_cut(hits: Sequence[Hit], title: str) -> bytes:
    """One clip for each file, whole, with a marker for each hit in it."""
    footage = look_at(hits)
    root = ET.Element("fcpxml", version="1.9")
    resources = ET.SubElement(root, "resources")
    event = ET.SubElement(ET.SubElement(root, "library"), "event", name=title[:200])
    for number, (path, file) in enumerate(footage.items(), start=1):
        step = 1 / file.rate
        duration = _seconds(max(1, file.frame_at(file.duration_s)) * step)
        size = {"width": str(file.width), "height": str(file.height)}
        picture = {"id": f"f{number}", "frameDuration": _seconds(step), **size}
        ET.SubElement(resources, "format", picture)
        name = _text(os.path.basename(path))
        facts = {"name": name, "start": "0s", "duration": duration, "format": f"f{number}"}
        asset = ET.SubElement(resources, "asset", {"id": f"a{number}", "hasVideo": "1", **facts})
        ET.SubElement(asset, "media-rep", kind="original-media", src=Path(path).as_uri())
        clip = ET.SubElement(event, "asset-clip", {"ref": f"a{number}", **facts})
        for hit in hits:
            if hit.path == path:
                first, last = _frames(hit, file)
                times = {"start": _seconds(first * step), "duration": _seconds((last - first) * step)}
                ET.SubElement(clip, "marker", {"value": _label(hit), "note": title, **times})
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8")
    return b'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE fcpxml>\n' + content + b"\n"


FORMATS: dict[str, Callable[[Sequence[Hit], str], bytes]] = {
    ".csv": _table,
    ".edl": _edit_list,
    ".fcpxml": _final_cut,
}


def _frames(hit: Hit, file: Footage) -> tuple[int, int]:
    first = file.frame_at(hit.start_s)
    return first, max(first + 1, file.frame_at(hit.end_s))


def _label(hit: Hit) -> str:
    grade = f" {hit.strength}" if hit.strength else ""
    return f"{hit.rank}{grade} {hit.score:.4f} {hit.score_kind}"


def _seconds(time: Fraction) -> str:
    return f"{time.numerator}s" if time.denominator == 1 else f"{time.numerator}/{time.denominator}s"


def _text(text: str) -> str:
    """Return a text in which bytes that are no text, and control characters, are written with escapes."""
    known = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() or char in "\t\n" else repr(char)[1:-1] for char in known)
