"""Who may ask: names of this host only, no other web pages, and whoever has the token.

A page of another origin can make a browser send requests here, and, by pointing its own name at this
machine's address, even read the answers. So the name in ``Host`` must be one of ours, a request that says it
comes from another origin is refused, and cookies are never sent along by other sites.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.serving.settings import ServeSettings, is_loopback
from vlm.serving.transport.problems import Problem, answer

COOKIE = "vlm_session"
SESSION_S = 12 * 3600
_MAX_SESSIONS = 256
# readable without a token: whether the server lives, and the page's shell, which holds nothing of the index
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/api/session"})
OPEN_FOLDER = "/static/"
# the page runs its own scripts and styles, loads nothing from elsewhere, and is shown in nobody's frame
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


class Sessions:
    """Browsers that have shown the token; they hold a random name in a cookie that scripts cannot read."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else _digest(token)
        self._ends: dict[bytes, float] = {}

    @property
    def is_required(self) -> bool:
        """Whether clients need a token at all."""
        return self._token is not None

    def accepts_token(self, token: str) -> bool:
        """Whether this is the token; the time to tell does not depend on how much of it is right."""
        return self._token is None or hmac.compare_digest(_digest(token), self._token)

    def begin(self) -> str:
        """Return the name of a new session."""
        now = time.monotonic()
        self._ends = {name: end for name, end in self._ends.items() if end > now}
        while len(self._ends) >= _MAX_SESSIONS:
            del self._ends[next(iter(self._ends))]
        name = secrets.token_urlsafe(32)
        self._ends[_digest(name)] = now + SESSION_S
        return name

    def end(self, name: str) -> None:
        """Forget a session."""
        self._ends.pop(_digest(name), None)

    def is_open(self, name: str) -> bool:
        """Whether there is such a session."""
        return self._ends.get(_digest(name), 0.0) > time.monotonic()


class Guard:
    """Lets through what may pass, and puts safe headers on every answer."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, sessions: Sessions) -> None:
        self._app, self._settings, self._sessions = app, settings, sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, then pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Content-Security-Policy", _DATA_POLICY)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
        except Problem as problem:
            await answer(problem)(scope, receive, send_safely)
            return
        await self._app(scope, receive, send_safely)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise Problem (403 or 401) unless a request may pass."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._knows(host):
            raise Problem(
                403, "host", "this server does not answer to that host name; its owner can add --allow-host"
            )
        origin = headers.get("origin")
        is_ours = origin is None or origin in (f"http://{host}", f"https://{host}")
        site = headers.get("sec-fetch-site", "none")
        is_page = method in ("GET", "HEAD") and path == "/"  # a link to the page may come from anywhere
        is_foreign = site in ("cross-site", "same-site") and origin is None and not is_page
        if not is_ours or is_foreign:
            raise Problem(403, "origin", "requests of other web pages are refused")
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or not self._sessions.is_required:
            return
        if not self._is_known(headers):
            raise Problem(
                401, "token", "a valid token is needed: Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            urlsplit(f"//{host}").port  # noqa: B018 - raises if it is no number
        except ValueError:
            return False
        name = name.rstrip(".")
        if is_loopback(name) or name in {known.lower() for known in self._settings.allowed_hosts}:
            return True
        if is_loopback(self._settings.host):
            return False
        # rebinding needs a name: an address cannot be pointed elsewhere
        return name == self._settings.host.lower() or _is_address(name)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._sessions.accepts_token(token.strip())
        name = session_of(headers)
        return name is not None and self._sessions.is_open(name)


def session_of(headers: Headers) -> str | None:
    """Return the name of the session that a request claims, or None."""
    # the standard library's parser gives up at the first pair of another site's that it finds odd
    return cookie_parser("; ".join(headers.getlist("cookie"))).get(COOKIE)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
