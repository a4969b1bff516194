"""Indexed videos for viewers: their facts, bytes, pictures, and clips that any browser plays."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm.errors import DataError, InvalidInput
from vlm.retrieval.catalog import VideoRow
from vlm.serving.library import without_paths
from vlm.serving.media.cache import Entry
from vlm.serving.media.pictures import strip_times
from vlm.serving.schemas import parse_instant, parse_span
from vlm.serving.state import State, state_of
from vlm.serving.transport.problems import NotFound
from vlm.serving.transport.ranges import file_response

_WIDTHS = ("160", "320", "640")
_STRIP_CELLS = 8
_STRIP_WIDTH = 320
_CLIP = re.compile(r"[0-9a-f]{32}\.(?:mp4|webm)", re.ASCII)
_KEEP = {"Cache-Control": "private, max-age=600"}
# what is said of a file that a browser cannot play: to save it, not to show it
_UNPLAYABLE = "application/octet-stream"
_JOB_S = 45.0


async def video(request: Request) -> Response:
    """Return what a video is, and how a browser can play it."""
    state = state_of(request)
    library = state.service.library
    row = library.video(request.path_params["video_id"])
    play = await _description(state, row)
    return JSONResponse(
        {
            "video_id": row.video_id,
            "name": os.path.basename(os.fsdecode(row.path)).encode("utf-8", "backslashreplace").decode(),
            "duration_s": row.duration_s,
            "width": row.width,
            "height": row.height,
            "codec": row.codec,
            "size_bytes": row.size_bytes,
            "num_segments": row.num_segments,
            "domain": row.domain,
            "play": play["play"],
            "generation": library.generation,
        }
    )


async def content(request: Request) -> Response:
    """Return the bytes of a video's file, or a range of them."""
    state = state_of(request)
    library = state.service.library
    row = library.video(request.path_params["video_id"])
    play = await _description(state, row)
    descriptor, _ = await asyncio.to_thread(library.open_file, row.video_id)
    kind = play["content_type"] if play["play"] == "direct" else _UNPLAYABLE
    return file_response(request, descriptor, kind, row.sha256[:32], {"Cache-Control": "private, no-cache"})


async def thumbnail(request: Request) -> Response:
    """Return the frame at a time as a JPEG."""
    row, state = _row(request)
    width = request.query_params.get("width", "320")
    if width not in _WIDTHS:
        raise InvalidInput(f"width: expected one of {', '.join(_WIDTHS)}")
    at = parse_instant(request.query_params, "at_s", row.duration_s)
    # a tenth of a second is close enough for a picture, and lets neighbours share one
    time_s = round(min(at, max(0.0, row.duration_s - 0.05)), 1)
    return await _picture(request, state, row, [time_s], int(width))


async def filmstrip(request: Request) -> Response:
    """Return eight frames of a stretch side by side as a JPEG."""
    row, state = _row(request)
    start, end = parse_span(request.query_params, row.duration_s, state.limits.max_clip_s)
    return await _picture(request, state, row, strip_times(start, end, _STRIP_CELLS), _STRIP_WIDTH)


async def playback(request: Request) -> Response:
    """Return where a browser finds a stretch of a video in a form that it plays, made now if need be."""
    row, state = _row(request)
    start, end = parse_span(request.query_params, row.duration_s, state.limits.max_clip_s)
    play = await _description(state, row)
    if play["play"] == "direct":
        await asyncio.to_thread(state.service.library.path, row.video_id)
        url, offset = f"/api/videos/{row.video_id}/content", 0.0
        return JSONResponse({"url": url, "offset_s": offset, "how": "direct"})
    suffix = ".webm" if play["content_type"] == "video/webm" else ".mp4"
    how = suffix[1:] if play["play"] == "remux" else "transcode"

    def produce(out: Path) -> dict[str, Any]:
        return _run(state, row, "cut", start_s=start, end_s=end, out=str(out), how=how)

    entry = await _made(state, (row.sha256, "clip", start, end, how), suffix, produce)
    state.metrics.count("clips_total", how=play["play"])
    return JSONResponse(
        {"url": f"/api/clips/{entry.name}", "offset_s": entry.facts["offset_s"], "how": play["play"]}
    )


async def clip(request: Request) -> Response:
    """Return the bytes of a prepared clip, or a range of them."""
    state, name = state_of(request), request.path_params["name"]
    entry = state.cache.get(name) if _CLIP.fullmatch(name) else None
    if entry is None:
        raise NotFound("clip any more; ask for its playback again")
    kind = "video/webm" if name.endswith(".webm") else "video/mp4"
    return file_response(request, _open(entry), kind, name.partition(".")[0], _KEEP)


async def _picture(
    request: Request, state: State, row: VideoRow, times_s: list[float], width: int
) -> Response:
    def produce(out: Path) -> dict[str, Any]:
        return _run(state, row, "strip", times_s=times_s, width=width, out=str(out))

    entry = await _made(state, (row.sha256, "strip", times_s, width), ".jpg", produce)
    return file_response(request, _open(entry), "image/jpeg", entry.name.partition(".")[0], _KEEP)


async def _description(state: State, row: VideoRow) -> dict[str, Any]:
    """Return how a browser can be given a file; looked up once, then kept."""

    def produce(out: Path) -> dict[str, Any]:
        out.touch()
        return _run(state, row, "describe")

    return (await _made(state, (row.sha256, "description"), ".about", produce)).facts


async def _made(
    state: State, what: tuple[object, ...], suffix: str, produce: Callable[[Path], dict[str, Any]]
) -> Entry:
    """Return a file from the cache, or have it made when it is this request's turn."""
    found = state.cache.find(what, suffix)
    state.metrics.count("media_cache_total", result="miss" if found is None else "hit", kind=suffix[1:])
    return await state.media.run(state.cache.make, what, suffix, produce) if found is None else found


def _open(entry: Entry) -> int:
    try:
        return os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound("file in the cache any more; ask again") from error


def _run(state: State, row: VideoRow, kind: str, **job: Any) -> dict[str, Any]:
    """Have a worker do a job on a video's file."""
    path = state.service.library.path(row.video_id)
    try:
        return state.workers.run(kind, _JOB_S, path=str(path), **job)
    except DataError as error:
        raise without_paths(error, path, f"video {row.video_id}") from error


def _row(request: Request) -> tuple[VideoRow, State]:
    state = state_of(request)
    return state.service.library.video(request.path_params["video_id"]), state


def _routes() -> list[Route]:
    below: dict[str, Callable[[Request], Any]] = {
        "": video,
        "/content": content,
        "/thumbnail": thumbnail,
        "/filmstrip": filmstrip,
        "/playback": playback,
    }
    routes = [Route(f"/api/videos/{{video_id}}{path}", call, methods=["GET"]) for path, call in below.items()]
    return [*routes, Route("/api/clips/{name}", clip, methods=["GET"])]


ROUTES = _routes()
