"""Searching and asking."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vlm.errors import BusyError, DataError
from vlm.serving.library import without_paths
from vlm.serving.schemas import (
    hit_values,
    page_values,
    parse_ask,
    parse_search,
    parse_similar,
    parse_upload,
)
from vlm.serving.state import State, state_of
from vlm.serving.transport.bodies import read_json, saved


async def search(request: Request) -> Response:
    """Search by words, or get a further page of any search."""
    state = state_of(request)
    wanted = parse_search(await _json(request, state), state.limits)
    page = await state.service.search(wanted.text, wanted.query_id, wanted.parts, options=wanted.options)
    return JSONResponse(page_values(page, state.service.model.domain))


async def search_image(request: Request) -> Response:
    """Search by a picture, whose bytes are the body."""
    state = state_of(request)
    wanted = parse_upload(request.query_params, state.limits)
    async with _uploaded(request, state, ".picture", state.limits.max_image_bytes) as (path, digest):
        out = path.with_suffix(".npy")
        try:
            try:
                await state.media.run(
                    lambda: state.workers.run("picture", state.limits.timeout_s, path=str(path), out=str(out))
                )
            except DataError as error:
                raise without_paths(error, path, "the picture") from error
            pixels = await asyncio.to_thread(np.load, out, allow_pickle=False)
        finally:
            out.unlink(missing_ok=True)
        page = await state.service.search_upload(
            "image", digest, pixels, top_k=wanted.top_k, where=wanted.where
        )
    return JSONResponse(page_values(page, state.service.model.domain))


async def search_video(request: Request) -> Response:
    """Search by a video, whose bytes are the body."""
    state = state_of(request)
    wanted = parse_upload(request.query_params, state.limits)
    async with _uploaded(request, state, ".video", state.limits.max_video_bytes) as (path, digest):
        try:
            page = await state.service.search_upload(
                "video", digest, path, top_k=wanted.top_k, where=wanted.where
            )
        except DataError as error:
            raise without_paths(error, path, "the video") from error
    return JSONResponse(page_values(page, state.service.model.domain))


async def similar(request: Request) -> Response:
    """Find moments of other videos that are like an indexed one."""
    state = state_of(request)
    wanted = parse_similar(await _json(request, state), state.limits)
    page = await state.service.similar(
        wanted.video_id, wanted.start_s, top_k=wanted.top_k, offset=wanted.offset, where=wanted.where
    )
    return JSONResponse(page_values(page, state.service.model.domain))


async def ask(request: Request) -> Response:
    """Answer a question, and show where the answer was seen."""
    state = state_of(request)
    wanted = parse_ask(await _json(request, state), state.limits)
    chosen, hit, words = await state.service.ask(wanted.question, wanted.choices, wanted.video_id)
    answers = [{"text": answer.text, "score": answer.score} for answer in chosen.answers] if chosen else []
    return JSONResponse(
        {
            "question": wanted.question,
            "answer": answers[0]["text"] if answers else None,
            "choices": answers,
            "evidence": hit_values(hit),
            "unknown_words": list(words),
            "model_domain": state.service.model.domain,
        }
    )


@asynccontextmanager
async def _uploaded(
    request: Request, state: State, suffix: str, max_bytes: int
) -> AsyncIterator[tuple[Path, bytes]]:
    """Give an uploaded file and the hash of its bytes."""
    if state.num_uploads >= state.limits.max_uploads:
        raise BusyError("too many uploads at once; try again")
    state.num_uploads += 1
    try:
        async with saved(request, state.uploads, suffix, max_bytes, state.limits.body_timeout_s) as path:
            yield path, await asyncio.to_thread(_digest, path)
    finally:
        state.num_uploads -= 1


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


async def _json(request: Request, state: State) -> dict[str, Any]:
    return await read_json(request, state.limits.max_json_bytes, state.limits.body_timeout_s)


ROUTES = [
    Route("/api/search", search, methods=["POST"]),
    Route("/api/search/image", search_image, methods=["POST"]),
    Route("/api/search/video", search_video, methods=["POST"]),
    Route("/api/similar", similar, methods=["POST"]),
    Route("/api/ask", ask, methods=["POST"]),
]
