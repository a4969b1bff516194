"""Files by byte range (RFC 9110, section 14): one range a request, read from a descriptor that is at hand."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_CHUNK_BYTES = 256 << 10
_LONGEST_HEADER = 100
_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [first, last], both included."""

    first: int
    last: int


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """Return which bytes of a file of `size` bytes are asked for, or None for all of them.

    A header of several ranges, of another unit, or that is no range at all is ignored, as the standard
    allows: answering many ranges costs the server far more than asking for them.

    Raises:
        LookupError: The range lies beyond the end of the file.
    """
    if header is None or len(header) > _LONGEST_HEADER:
        return None
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        length = min(int(last), size)
        if length == 0:
            raise LookupError(header)
        return ByteRange(size - length, size - 1)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        raise LookupError(header)
    return ByteRange(int(first), min(int(last), size - 1) if last else size - 1)


def file_response(
    request: Request, descriptor: int, content_type: str, etag: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the file, or the part of it that the request asks for: 200, 206, 304 or 416; HEAD without bytes.

    Args:
        request: Its method, ``Range``, ``If-Range`` and ``If-None-Match`` are obeyed.
        descriptor: An open file; it is closed whatever happens.
        content_type: Its media type.
        etag: Changes whenever the content does; without quotes.
        headers: More headers for the answer.
    """
    size = os.fstat(descriptor).st_size
    quoted = f'"{etag}"'
    common = {"Accept-Ranges": "bytes", "ETag": quoted, **(headers or {})}
    matches = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    if quoted in matches or "*" in matches:
        os.close(descriptor)
        return Response(status_code=304, headers=common)
    wanted = request.headers.get("range")
    if request.headers.get("if-range", quoted) != quoted:
        wanted = None
    try:
        part = parse_range(wanted, size)
    except LookupError:
        os.close(descriptor)
        return Response(status_code=416, headers={**common, "Content-Range": f"bytes */{size}"})
    span = part or ByteRange(0, size - 1)
    common["Content-Length"] = str(span.last - span.first + 1)
    if part is not None:
        common["Content-Range"] = f"bytes {part.first}-{part.last}/{size}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        os.close(descriptor)
        return Response(status_code=status, headers=common, media_type=content_type)
    return _FileSlice(descriptor, span, status, common, content_type)


class _FileSlice(StreamingResponse):
    """Some bytes of an open file, which is closed even if nobody takes them."""

    def __init__(
        self, descriptor: int, span: ByteRange, status: int, headers: Mapping[str, str], content_type: str
    ) -> None:
        super().__init__(_read(descriptor, span), status, headers, content_type)
        self._descriptor = descriptor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


async def _read(descriptor: int, span: ByteRange) -> AsyncIterator[bytes]:
    position, end = span.first, span.last + 1
    while position < end:
        count = min(_CHUNK_BYTES, end - position)
        content = await asyncio.to_thread(os.pread, descriptor, count, position)
        if not content:
            raise OSError("the file became shorter while it was sent")
        position += len(content)
        yield content
