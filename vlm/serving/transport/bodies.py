"""Bodies of requests, read with a size limit and a clock."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request

from vlm.serving.transport.problems import Problem, TooLarge

_LINGER_S = 1.0
_LINGER_BYTES = 8 << 20


async def read_json(request: Request, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """Return the JSON object that a request carries.

    Raises:
        Problem: It is of another type (415), too large (413), too slow (408), or no JSON object (400).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a form of another web page can send other types without being asked for permission, but not this
        raise Problem(415, "content_type", f"expected Content-Type application/json, got {kind[:100]!r}")
    content = b"".join([piece async for piece in pieces(request, max_bytes, timeout_s)])
    try:
        value = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "invalid_json", f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise Problem(400, "invalid_json", f"expected a JSON object, got {type(value).__name__}")
    return value


@asynccontextmanager
async def saved(
    request: Request, folder: Path, suffix: str, max_bytes: int, timeout_s: float
) -> AsyncIterator[Path]:
    """Give the path of a temporary file with the body; it is gone afterwards.

    Raises:
        Problem: The body is empty (400), too large (413) or too slow (408).
    """
    descriptor, name = tempfile.mkstemp(suffix, "upload-", folder)
    path = Path(name)
    try:
        size = 0
        with os.fdopen(descriptor, "wb") as file:
            async for piece in pieces(request, max_bytes, timeout_s):
                size += len(piece)
                await asyncio.to_thread(file.write, piece)
        if not size:
            raise Problem(400, "empty", "the body is empty: send the file's bytes")
        yield path
    finally:
        path.unlink(missing_ok=True)


async def pieces(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """Yield the body as it comes.

    Raises:
        Problem: It is too large (413), or a piece took too long (408).
    """
    announced = request.headers.get("content-length", "")
    stream, size = request.stream(), 0
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        await _discard(stream)
        raise TooLarge(f"the body has {announced[:20]} bytes, expected at most {max_bytes}")
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                piece = await anext(stream, None)
        except TimeoutError as error:
            message = f"no more of the body came in {timeout_s:g} s"
            raise Problem(408, "too_slow", message, {"Connection": "close"}) from error
        except ClientDisconnect as error:
            raise Problem(400, "disconnected", "the body ended early") from error
        if piece is None:
            return
        size += len(piece)
        if size > max_bytes:
            await _discard(stream)
            raise TooLarge(f"the body has more than {max_bytes} bytes")
        if piece:
            yield piece


async def _discard(stream: AsyncIterator[bytes]) -> None:
    """Read on a little: a client that is cut off while it sends never gets to see the answer."""
    size = 0
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_LINGER_S):
            async for piece in stream:
                size += len(piece)
                if size > _LINGER_BYTES:
                    return


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
