"""Our own layout for every benchmark: one JSON file that says what it is and which files it was made of.

``{"format": "vlm-annotations/1", "kind": "captions" | "questions" | "moments", "protocol": NAME,
"made_of": {file: sha256}, "items": [...]}``; an item has the fields of ``Captioned``, ``Question`` or
``Moment``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vlm.data.annotations.benchmarks.records import Captioned, Moment, Question, Record

FORMAT = "vlm-annotations/1"
_KINDS: dict[type[Record], str] = {Captioned: "captions", Question: "questions", Moment: "moments"}


def is_unified(value: Any) -> bool:
    """Whether a JSON value is a file of this layout."""
    return isinstance(value, dict) and value.get("format") == FORMAT


def to_json(records: Sequence[Record], protocol: str, made_of: Mapping[str, str]) -> str:
    """Return the file's content; the same for the same records on every machine.

    Args:
        records: Of one kind, at least one.
        protocol: Name of the protocol that they are for.
        made_of: Name → sha256 of the files they were read from.
    """
    head = {
        "format": FORMAT,
        "kind": _KINDS[type(records[0])],
        "protocol": protocol,
        "made_of": dict(made_of),
    }
    start = json.dumps(head, ensure_ascii=False)[:-1]
    items = ",\n".join(json.dumps(asdict(record), ensure_ascii=False) for record in records)
    return f'{start}, "items": [\n{items}\n]}}\n'


def parse_captions(value: Any) -> list[Captioned]:
    """Return the items of a file of captions; raises KeyError, TypeError or ValueError if it is not one."""
    return [
        Captioned(videos=_tuple(item["videos"]), captions=_tuple(item["captions"]))
        for item in _items(value, "captions")
    ]


def parse_questions(value: Any) -> list[Question]:
    """Return the items of a file of questions; errors as of ``parse_captions``."""
    return [
        Question(**{**item, "answers": _tuple(item["answers"]), "candidates": tuple(item["candidates"])})
        for item in _items(value, "questions")
    ]


def parse_moments(value: Any) -> list[Moment]:
    """Return the items of a file of moments; errors as of ``parse_captions``."""
    return [
        Moment(
            **{
                **item,
                "windows": tuple((float(a), float(b)) for a, b in item["windows"]),
                "ratings": tuple((int(clip), tuple(map(float, of))) for clip, of in item.get("ratings", ())),
            }
        )
        for item in _items(value, "moments")
    ]


def _items(value: Any, kind: str) -> list[dict[str, Any]]:
    if value["kind"] != kind:
        raise ValueError(f"holds {value['kind']!r}, expected {kind!r}")
    items: list[dict[str, Any]] = value["items"]
    return items


def _tuple(values: Any) -> tuple[str, ...]:
    if not values or not all(isinstance(text, str) for text in values):
        raise ValueError(f"expected texts, got {values!r:.80}")
    return tuple(values)
