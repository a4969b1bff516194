"""Known items: hits that somebody starred, kept as rows of the file that `vlm index check` reads."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm.errors import InvalidInput
from vlm.retrieval.quality.known_items import KnownItem, find_videos
from vlm.retrieval.quality.starring import KnownItemFile, key_of
from vlm.serving.library import Library
from vlm.serving.schemas import parse_star
from vlm.serving.state import State, state_of
from vlm.serving.transport.bodies import read_json
from vlm.serving.transport.problems import NotFound, Problem

Result = TypeVar("Result")


async def overview(request: Request) -> Response:
    """Return the known items, and the command that measures the index with them."""
    state = state_of(request)
    file, library = _file(state), state.service.library
    items = await _work(file, file.read)
    # a store does not know where the index lies that it was published from
    index = "INDEX" if library.is_store else os.path.realpath(library.searcher.index.folder)
    command = shlex.join(["vlm", "index", "check", index, "--queries", str(file.path)])
    return JSONResponse(
        {
            "queries": await asyncio.to_thread(_values, items, file, library),
            "command": command.encode("utf-8", "backslashreplace").decode(),
        }
    )


async def star(request: Request) -> Response:
    """Append a row, unless the same is there."""
    state = state_of(request)
    limits, file, library = state.limits, _file(state), state.service.library
    values = await read_json(request, limits.max_json_bytes, limits.body_timeout_s)
    wanted = parse_star(values, limits)
    video = library.video(wanted.video_id)
    # a segment's end may lie a frame behind the duration that a container states
    if wanted.end_s > video.duration_s + 1:
        raise InvalidInput(f"end_s: the video ends after {video.duration_s:.3f} s")
    videos = list(library.videos.values())
    item = await _work(file, lambda: file.add(wanted.text, video, wanted.start_s, wanted.end_s, videos))
    return JSONResponse((await asyncio.to_thread(_values, [item], file, library))[0])


async def unstar(request: Request) -> Response:
    """Take out a row."""
    state = state_of(request)
    file = _file(state)
    item = await _work(file, lambda: file.remove(request.path_params["key"]))
    if item is None:
        raise NotFound("query")
    return JSONResponse((await asyncio.to_thread(_values, [item], file, state.service.library))[0])


def _file(state: State) -> KnownItemFile:
    if state.known is None:
        raise Problem(
            404, "no_queries_file", "this server keeps no queries; its owner can add --queries FILE.csv"
        )
    return state.known


async def _work(file: KnownItemFile, work: Callable[[], Result]) -> Result:
    """Do something with the file beside other requests; what is wrong with it is no client's fault."""
    try:
        return await asyncio.to_thread(work)
    except InvalidInput as error:
        message = str(error).replace(str(file.path), file.path.name)
        raise Problem(409, "queries_file", message.encode("utf-8", "backslashreplace").decode()) from error


def _values(items: list[KnownItem], file: KnownItemFile, library: Library) -> list[dict[str, Any]]:
    targets = find_videos(items, library.videos.values(), file.path.parent)
    return [
        {
            "key": key_of(item),
            "text": item.query,
            "video_id": video_id,
            "video": item.video,
            "start_s": item.start_s,
            "end_s": item.end_s,
        }
        for item, video_id in zip(items, targets, strict=True)
    ]


ROUTES = [
    Route("/api/queries", overview, methods=["GET"]),
    Route("/api/queries", star, methods=["POST"]),
    Route("/api/queries/{key}", unstar, methods=["DELETE"]),
]
