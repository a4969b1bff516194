"""The application: routes, the guard before them, and one place where errors become answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.errors import BusyError
from vlm.serving.routes import ingest, queries, search, system, videos
from vlm.serving.state import State
from vlm.serving.transport.metrics import Metrics
from vlm.serving.transport.problems import Problem, answer, to_problem
from vlm.serving.transport.security import Guard

# before a refusal is told, for so many at once: each keeps its connection
_PAUSE_S, _MOST_PAUSED = 0.5, 500

ROUTES: list[Route] = [*system.ROUTES, *search.ROUTES, *videos.ROUTES, *ingest.ROUTES, *queries.ROUTES]


def make_app(state: State) -> Starlette:
    """Return the application over a service's parts; they are closed when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        following = asyncio.create_task(state.service.follow())
        try:
            yield
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
            await asyncio.to_thread(state.close)

    app = Starlette(
        routes=list[BaseRoute](ROUTES),
        middleware=[
            Middleware(Recorder, metrics=state.metrics),
            Middleware(Guard, settings=state.settings, sessions=state.sessions),
            Middleware(Explainer),
        ],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.vlm = state
    return app


_PATHS = {route.endpoint: route.path for route in ROUTES}


def _path_of(scope: Scope) -> str:
    """Return the route of a request that did not reach one."""
    return next((route.path for route in ROUTES if route.matches(scope)[0] != Match.NONE), "none")


class Recorder:
    """Counts and times every request by the route that it took, never by what the client wrote."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            route = _PATHS.get(scope.get("endpoint", _no_route)) or _path_of(scope)
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE") else "other"
            self._metrics.count("http_requests_total", method=method, route=route, status=str(status))
            self._metrics.observe("http_request_duration_seconds", time.perf_counter() - started, route=route)


class Explainer:
    """Turns whatever a route raises into an answer, unless half of one was sent already.

    Who is refused for want of room hears so after a pause: clients that come back at once, whatever they are
    told, would else have the server do little but refuse them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._num_paused = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and answer its errors."""
        has_begun = False

        async def note(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            problem = to_problem(error)
            if has_begun or scope["type"] != "http":
                raise
            if isinstance(error, BusyError):
                await self._pause()
            await answer(problem)(scope, receive, send)

    async def _pause(self) -> None:
        if self._num_paused >= _MOST_PAUSED:
            return
        self._num_paused += 1
        try:
            await asyncio.sleep(_PAUSE_S)
        finally:
            self._num_paused -= 1


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        problem = Problem(
            405, "method", f"{request.method[:20]} is not possible here", dict(error.headers or {})
        )
    else:
        problem = Problem(error.status_code, "not_found", "nothing lies at this address")
    return answer(problem)
