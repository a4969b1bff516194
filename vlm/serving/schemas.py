"""What requests say and answers hold: checked field by field, nothing unknown let through."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm.errors import InvalidInput
from vlm.retrieval.queries.options import SearchOptions
from vlm.retrieval.queries.values import MAX_PARTS, Moment
from vlm.serving.service import NamedPart, Page
from vlm.serving.settings import Limits
from vlm.types import Duplicate, Hit

_NAMED = ("text", "query_id", "parts")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRequest:
    """A search by words or by a sum, or a further page of any search by its `query_id`."""

    text: str | None = None
    query_id: str | None = None
    parts: tuple[NamedPart, ...] = ()
    options: SearchOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadRequest:
    """What the address of an upload may say."""

    top_k: int = 10
    where: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SimilarRequest:
    """More like a segment of an indexed video."""

    video_id: str
    start_s: float
    top_k: int = 10
    offset: int = 0
    where: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AskRequest:
    """A question, with answers to choose from if there are any."""

    question: str
    choices: list[str] | None = None
    video_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestRequest:
    """One of the folders that the server was started with."""

    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StarRequest:
    """A text and the moment that it should find."""

    text: str
    video_id: str
    start_s: float
    end_s: float


def parse_search(values: Mapping[str, Any], limits: Limits) -> SearchRequest:
    """Read a search.

    Raises:
        InvalidInput: A field is unknown, missing, of the wrong type or out of range.
    """
    _known(values, *_NAMED, *_names(SearchOptions))
    if sum(values.get(name) is not None for name in _NAMED) != 1:
        raise InvalidInput(f"expected one of {', '.join(_NAMED)}")
    return SearchRequest(
        text=_optional_text(values, "text", limits.max_text),
        query_id=_optional_text(values, "query_id", 64),
        parts=tuple(_part(part, limits) for part in _objects(values, "parts", 1)),
        options=SearchOptions(
            top_k=_integer(values, "top_k", 10, 1, limits.max_top_k),
            offset=_integer(values, "offset", 0, 0, limits.max_top_k),
            rerank=_integer(values, "rerank", 0, 0, limits.max_rerank),
            where=_optional_text(values, "where", limits.max_where),
            aggregate=values.get("aggregate", "max"),
            min_strength=values.get("min_strength"),
            unlike=tuple(_moment(moment) for moment in _objects(values, "unlike", 0)),
            group=_boolean(values, "group", True),
            words=_boolean(values, "words", False),
        ),
    )


def parse_upload(values: Mapping[str, str], limits: Limits) -> UploadRequest:
    """Read the address of an upload; see `parse_search`."""
    _known(values, *_names(UploadRequest))
    numbers = {"top_k": _from_address(values, "top_k", "10")}
    return UploadRequest(
        top_k=_integer(numbers, "top_k", 10, 1, limits.max_top_k),
        where=_optional_text(values, "where", limits.max_where),
    )


def parse_similar(values: Mapping[str, Any], limits: Limits) -> SimilarRequest:
    """Read a wish for similar moments; see `parse_search`."""
    _known(values, *_names(SimilarRequest))
    return SimilarRequest(
        video_id=_text(values, "video_id", 64),
        start_s=_seconds(values, "start_s"),
        top_k=_integer(values, "top_k", 10, 1, limits.max_top_k),
        offset=_integer(values, "offset", 0, 0, limits.max_top_k),
        where=_optional_text(values, "where", limits.max_where),
    )


def parse_ask(values: Mapping[str, Any], limits: Limits) -> AskRequest:
    """Read a question; see `parse_search`."""
    _known(values, *_names(AskRequest))
    choices = values.get("choices")
    if choices is not None:
        if not isinstance(choices, list) or not 2 <= len(choices) <= limits.max_choices:
            raise InvalidInput(f"choices: expected a list of 2 to {limits.max_choices} texts")
        choices = [_text({"choices": choice}, "choices", limits.max_text) for choice in choices]
    return AskRequest(
        question=_text(values, "question", limits.max_text),
        choices=choices,
        video_id=_optional_text(values, "video_id", 64),
    )


def parse_ingest(values: Mapping[str, Any]) -> IngestRequest:
    """Read which folder is to be indexed; see `parse_search`."""
    _known(values, *_names(IngestRequest))
    return IngestRequest(folder=_text(values, "folder", 100))


def parse_star(values: Mapping[str, Any], limits: Limits) -> StarRequest:
    """Read what a text should find; see `parse_search`."""
    _known(values, *_names(StarRequest))
    start, end = (_seconds(values, name) for name in ("start_s", "end_s"))
    if not start < end:
        raise InvalidInput(f"expected start_s < end_s, got {start:g} and {end:g}")
    return StarRequest(
        text=_text(values, "text", limits.max_text).strip(),
        video_id=_text(values, "video_id", 64),
        start_s=start,
        end_s=end,
    )


def parse_span(values: Mapping[str, str], duration_s: float, max_s: float) -> tuple[float, float]:
    """Read `start_s` and `end_s` from an address, clipped to the video; see `parse_search`."""
    start, end = (_seconds({name: _number(values.get(name))}, name) for name in ("start_s", "end_s"))
    start, end = min(start, duration_s), min(end, duration_s)
    if not 0 < end - start <= max_s:
        raise InvalidInput(f"expected 0 < end_s - start_s <= {max_s:g} within {duration_s:.3f} s of video")
    return start, end


def parse_instant(values: Mapping[str, str], name: str, duration_s: float) -> float:
    """Read a time of a video from an address, 0 if it names none; see `parse_search`."""
    time_s = _seconds({name: _number(values.get(name, "0"))}, name)
    # a segment's end may lie a frame behind the duration that a container states
    if time_s > duration_s + 1:
        raise InvalidInput(f"{name}: the video ends after {duration_s:.3f} s, got {time_s:g}")
    return time_s


def hit_values(hit: Hit) -> dict[str, Any]:
    """Return a hit as JSON; a file name that is no text is written with escapes."""
    # by hand: `dataclasses.asdict` copies every value deeply, and takes as long as the search
    values = _fields(hit)
    values["duplicates"] = [_fields(copy) for copy in hit.duplicates]
    return values


def _fields(item: Hit | Duplicate) -> dict[str, Any]:
    values = {name: getattr(item, name) for name in item.__dataclass_fields__}
    values["path"] = item.path.encode("utf-8", "backslashreplace").decode()
    return values


def page_values(page: Page, model_domain: str) -> dict[str, Any]:
    """Return a page of hits as JSON."""
    return {
        "hits": [hit_values(hit) for hit in page.hits],
        "generation": page.generation,
        "next_offset": page.next_offset,
        "query_id": page.query_id,
        "unknown_words": list(page.unknown_words),
        "notes": list(page.notes),
        "model_domain": model_domain,
    }


def _objects(values: Mapping[str, Any], name: str, least: int) -> list[Mapping[str, Any]]:
    found = values.get(name)
    if found is None:
        return []
    if not isinstance(found, list) or not least <= len(found) <= MAX_PARTS:
        raise InvalidInput(f"{name}: expected a list of {least} to {MAX_PARTS} objects")
    if not all(isinstance(item, dict) for item in found):
        raise InvalidInput(f"{name}: expected objects in the list")
    return found


def _part(values: Mapping[str, Any], limits: Limits) -> NamedPart:
    for name in values:
        if name not in ("text", "query_id", "video_id", "start_s", "weight"):
            raise InvalidInput(f"parts: unknown field {name[:100]!r}")
    if sum(values.get(name) is not None for name in ("text", "query_id", "video_id")) != 1:
        raise InvalidInput("parts: expected one of text, query_id and video_id in each")
    weight = values.get("weight", 1.0)
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 < abs(weight) <= 100:
        raise InvalidInput("weight: expected a number other than 0, from -100 to 100")
    is_moment = values.get("video_id") is not None
    return NamedPart(
        weight=float(weight),
        text=_optional_text(values, "text", limits.max_text),
        query_id=_optional_text(values, "query_id", 64),
        moment=Moment(_text(values, "video_id", 64), _seconds(values, "start_s")) if is_moment else None,
    )


def _moment(values: Mapping[str, Any]) -> Moment:
    for name in values:
        if name not in ("video_id", "start_s"):
            raise InvalidInput(f"unlike: unknown field {name[:100]!r}")
    return Moment(_text(values, "video_id", 64), _seconds(values, "start_s"))


def _names(request: type) -> list[str]:
    return [field.name for field in dataclasses.fields(request)]


def _known(values: Mapping[str, Any], *names: str) -> None:
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name[:100], names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise InvalidInput(f"unknown field {name[:100]!r}; {hint}")


def _text(values: Mapping[str, Any], name: str, longest: int) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInput(f"{name}: expected a text that is not empty")
    if len(value) > longest:
        raise InvalidInput(f"{name}: has {len(value)} characters, expected at most {longest}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidInput(f"{name}: holds characters that are no text")
    return value


def _optional_text(values: Mapping[str, Any], name: str, longest: int) -> str | None:
    return None if values.get(name) is None else _text(values, name, longest)


def _integer(values: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidInput(f"{name}: expected a whole number from {least} to {most}")
    return value


def _boolean(values: Mapping[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name}: expected true or false")
    return value


def _seconds(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1e9:
        raise InvalidInput(f"{name}: expected seconds from the video's start, 0 or more")
    return float(value)


def _from_address(values: Mapping[str, str], name: str, default: str) -> Any:
    text = values.get(name, default)
    return int(text) if len(text) < 10 and text.isascii() and text.isdecimal() else text


def _number(text: str | None) -> float:
    try:
        value = float((text or "")[:40])
    except ValueError:
        return math.nan
    return value
