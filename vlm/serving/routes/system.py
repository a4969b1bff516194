"""The page, the description of the interface, who may come in, and how the server is."""

from __future__ import annotations

import asyncio
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from vlm import __version__
from vlm.serving.openapi import document
from vlm.serving.state import state_of
from vlm.serving.transport.metrics import CONTENT_TYPE
from vlm.serving.transport.problems import NotFound, Problem
from vlm.serving.transport.security import COOKIE, PAGE_POLICY, SESSION_S, session_of

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def _load() -> dict[str, tuple[bytes, str]]:
    files = {}
    for file in resources.files("vlm.serving").joinpath("static").iterdir():
        kind = _KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None:
            files[file.name] = (file.read_bytes(), kind)
    return files


_FILES = _load()


async def page(request: Request) -> Response:
    """Return the web page."""
    return _file(request, "index.html")


async def static(request: Request) -> Response:
    """Return a file that the page needs."""
    return _file(request, request.path_params["name"])


async def session(request: Request) -> Response:
    """Tell whether a token is needed; with the token, begin a session whose name is kept in a cookie."""
    state = state_of(request)
    sessions = state.sessions
    if request.method == "POST":
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not sessions.accepts_token(token.strip()):
            raise Problem(401, "token", "this is not the token")
        response = JSONResponse({"is_required": sessions.is_required, "is_open": True})
        response.set_cookie(
            COOKIE, sessions.begin(), max_age=SESSION_S, httponly=True, samesite="strict", path="/",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response
    name = session_of(request.headers)
    if request.method == "DELETE":
        if name is not None:
            sessions.end(name)
        response = JSONResponse({"is_required": sessions.is_required, "is_open": not sessions.is_required})
        response.delete_cookie(COOKIE, path="/")
        return response
    is_open = not sessions.is_required or (name is not None and sessions.is_open(name))
    return JSONResponse({"is_required": sessions.is_required, "is_open": is_open})


async def info(request: Request) -> Response:
    """Return what the index holds and what its model can do."""
    state = state_of(request)
    library = state.service.library
    values = await asyncio.to_thread(library.searcher.index.info)
    del values["rejected"]  # may be long, and names files; the command line lists it
    return JSONResponse(
        {
            **values,
            "path": values["path"].encode("utf-8", "backslashreplace").decode(),
            "is_store": library.is_store,
            "capabilities": sorted(library.searcher.capabilities),
            "ingest_folders": sorted(state.jobs.folders),
            "keeps_queries": state.known is not None,
            "version": __version__,
            "limits": {
                "max_top_k": state.limits.max_top_k,
                "max_rerank": state.limits.max_rerank,
                "max_text": state.limits.max_text,
                "max_image_bytes": state.limits.max_image_bytes,
                "max_video_bytes": state.limits.max_video_bytes,
            },
        }
    )


async def openapi(request: Request) -> Response:
    """Return the description of this interface."""
    state = state_of(request)
    return JSONResponse(document(state.limits, state.known is not None))


async def health(request: Request) -> Response:
    """Tell that the process lives."""
    return PlainTextResponse("ok\n")


async def readiness(request: Request) -> Response:
    """Tell whether requests can be served: the index can be read, and nothing is shutting down."""
    state = state_of(request)
    if state.is_draining:
        raise Problem(503, "draining", "the server is shutting down", {"Retry-After": "5"})
    try:
        await asyncio.to_thread(state.service.library.is_newest)
    except Exception as error:
        raise Problem(503, "index", "the index cannot be read", {"Retry-After": "5"}) from error
    return PlainTextResponse("ready\n")


async def metrics(request: Request) -> Response:
    """Return the metrics in Prometheus's text format."""
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE)


def _file(request: Request, name: str) -> Response:
    if name not in _FILES:
        raise NotFound("file")
    content, kind = _FILES[name]
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers={**headers, "Content-Type": kind})


ROUTES = [
    Route("/", page, methods=["GET"]),
    Route("/static/{name}", static, methods=["GET"]),
    Route("/healthz", health, methods=["GET"]),
    Route("/readyz", readiness, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/api/session", session, methods=["GET", "POST", "DELETE"]),
    Route("/api/info", info, methods=["GET"]),
    Route("/api/openapi.json", openapi, methods=["GET"]),
]
