"""A served index from Python, with nothing but the standard library."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import quote, urlencode, urlsplit

from vlm.errors import BusyError, CapabilityError, DataError, InvalidInput, VlmError
from vlm.retrieval.queries.values import Mix, Moment, Part
from vlm.types import Answer, Hit, Segment

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_CHUNK_BYTES = 1 << 20
Body = bytes | IO[bytes]


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would carry the token elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """Searches an index that `vlm serve` serves; its hits equal those of a `Searcher` over that index.

    Args:
        address: Such as ``http://127.0.0.1:8000``.
        token: What the server wants presented, if it does.
        timeout_s: Longest wait for an answer.
        retries: How often to come back when the server is busy.

    Raises:
        InvalidInput: The address is none. All methods raise it, too, for what the server cannot use, or if no
            server answers; DataError for files it cannot read, CapabilityError for what its model cannot do,
            and BusyError while it is busy.
    """

    def __init__(
        self, address: str, token: str | None = None, *, timeout_s: float = 60.0, retries: int = 3
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(f"expected an address such as http://127.0.0.1:8000, got {address!r}")
        self.address = f"{parts.scheme}://{parts.netloc}"
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._timeout_s, self._retries = timeout_s, retries
        # no proxy of the environment: an address on this machine must stay on it
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _StayHere())

    def search(
        self,
        query: str | os.PathLike[str] | Moment | Mix,
        *,
        top_k: int = 10,
        offset: int = 0,
        rerank: int = 0,
        where: str | None = None,
        aggregate: Literal["max", "mean"] = "max",
        min_strength: Literal["strong", "weak"] | None = None,
        unlike: Sequence[Moment] = (),
        group: bool = True,
        words: bool = False,
    ) -> list[Hit]:
        """Return the best moments, at most one of each video.

        Args:
            query: A text; the path of an image or video file on this machine, which is uploaded; a moment of
                the index; or a sum of those.
            top_k: How many videos to return at most.
            offset: How many of the best to skip.
            rerank: Score this many of the nearest segments again with the matching head (texts only).
            where: A filter, as for `Searcher.search`.
            aggregate: What a video scores, as for `Searcher.search`.
            min_strength: Leave out what is weaker (texts only).
            unlike: "Not these": their videos are left out, and what is like them comes later.
            group: Name copies of a hit's footage with the hit instead of beside it.
            words: Also look for the text in names, tags, captions and subtitles.
        """
        values: dict[str, Any] = {"top_k": top_k, "offset": offset, "rerank": rerank, "where": where}
        values |= {"aggregate": aggregate, "min_strength": min_strength, "group": group, "words": words}
        values["unlike"] = [{"video_id": one.video_id, "start_s": one.start_s} for one in unlike]
        if isinstance(query, str):
            return _hits(self._post("/api/search", {**values, "text": query}))
        if rerank or min_strength is not None or words:
            raise CapabilityError("only searches by one text can be reranked, graded, or look at words")
        if isinstance(query, os.PathLike):
            return _hits(self._post("/api/search", {**values, "query_id": self._uploaded(Path(query))}))
        parts = query.parts if isinstance(query, Mix) else (Part(query),)
        return _hits(self._post("/api/search", {**values, "parts": [self._part(part) for part in parts]}))

    def _uploaded(self, path: Path) -> str:
        """Return the name that the server gives to a file's query."""
        kind = "image" if path.suffix.lower() in _IMAGE_SUFFIXES else "video"
        return str(self._upload(f"/api/search/{kind}?top_k=1", path, f"{kind}/*")["query_id"])

    def _part(self, part: Part) -> dict[str, Any]:
        query = part.query
        if isinstance(query, str):
            return {"text": query, "weight": part.weight}
        if isinstance(query, os.PathLike):
            return {"query_id": self._uploaded(Path(query)), "weight": part.weight}
        if isinstance(query, Moment):
            return {"video_id": query.video_id, "start_s": query.start_s, "weight": part.weight}
        raise InvalidInput(f"a served index takes texts, files and moments, got {type(query).__name__}")

    def similar(
        self, hit: Hit | Segment, *, top_k: int = 10, offset: int = 0, where: str | None = None
    ) -> list[Hit]:
        """Return moments of other videos that are like a hit."""
        values = {"video_id": hit.video_id, "start_s": hit.start_s, "top_k": top_k, "offset": offset}
        return _hits(self._post("/api/similar", {**values, "where": where}))

    def ask(
        self, question: str, choices: Sequence[str] | None = None, *, video_id: str | None = None
    ) -> list[Answer]:
        """Return the choices, best first, with the moment they were judged on.

        Without choices, the one answer has no text, only that moment.
        """
        values = {"question": question, "choices": None if choices is None else list(choices)}
        reply = self._post("/api/ask", {**values, "video_id": video_id})
        hit = Hit.from_json(reply["evidence"])
        segment = Segment(video_id=hit.video_id, path=hit.path, start_s=hit.start_s, end_s=hit.end_s)
        choices_found = reply["choices"] or [{"text": "", "score": hit.score}]
        return [Answer(text=c["text"], score=c["score"], evidence=(segment,)) for c in choices_found]

    def star(self, query: str, moment: Hit | Segment) -> dict[str, Any]:
        """Keep a text with the moment that it should find, for `vlm index check`; return the row.

        The server must have been started with ``--queries``; the same twice is one row.
        """
        values = {"text": query, "video_id": moment.video_id, "start_s": moment.start_s}
        return self._post("/api/queries", {**values, "end_s": moment.end_s})

    def starred(self) -> list[dict[str, Any]]:
        """Return the rows that `star` and people wrote; `video_id` is None if it left the index."""
        rows: list[dict[str, Any]] = self._get("/api/queries")["queries"]
        return rows

    def unstar(self, key: str) -> dict[str, Any]:
        """Take out the row of that `key`, and return it."""
        with self._open("DELETE", f"/api/queries/{quote(key, safe='')}") as reply:
            return _object(reply.read())

    def info(self) -> dict[str, Any]:
        """Return what the index holds and what its model can do."""
        return self._get("/api/info")

    def video(self, video_id: str) -> dict[str, Any]:
        """Return what a video is."""
        return self._get(f"/api/videos/{quote(video_id, safe='')}")

    def thumbnail(self, video_id: str, at_s: float = 0.0, *, width: int = 320) -> bytes:
        """Return the frame at a time as a JPEG; the width is 160, 320 or 640 pixels."""
        words = urlencode({"at_s": at_s, "width": width})
        return self._bytes(f"/api/videos/{quote(video_id, safe='')}/thumbnail?{words}")

    def download(self, video_id: str, path: str | os.PathLike[str]) -> int:
        """Write a video's file to a new file here, and return its size in bytes.

        Raises:
            FileExistsError: Something lies there already.
        """
        size = 0
        address = f"/api/videos/{quote(video_id, safe='')}/content"
        with self._open("GET", address) as reply, open(path, "xb") as file:
            while piece := reply.read(_CHUNK_BYTES):
                size += file.write(piece)
        return size

    def ingest(self, folder: str) -> dict[str, Any]:
        """Begin to index one of the server's own folders, by its name; return the job."""
        return self._post("/api/ingest", {"folder": folder})

    def job(self, job_id: str) -> dict[str, Any]:
        """Return how a job stands."""
        return self._get(f"/api/ingest/{quote(job_id, safe='')}")

    def wait(self, job_id: str, *, timeout_s: float = 3600.0, every_s: float = 0.5) -> dict[str, Any]:
        """Return a job once it is over.

        Raises:
            BusyError: It still runs after `timeout_s`.
        """
        end = time.monotonic() + timeout_s
        while (job := self.job(job_id))["state"] == "running":
            if time.monotonic() > end:
                raise BusyError(f"job {job_id} still runs after {timeout_s:g} s")
            time.sleep(every_s)
        return job

    def _get(self, address: str) -> dict[str, Any]:
        return _object(self._bytes(address))

    def _post(self, address: str, values: dict[str, Any]) -> dict[str, Any]:
        return _object(self._bytes(address, json.dumps(values).encode(), "application/json"))

    def _upload(self, address: str, path: Path, kind: str) -> dict[str, Any]:
        try:
            size = path.stat().st_size
            with path.open("rb") as file, self._open("POST", address, file, kind, size) as reply:
                return _object(reply.read())
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file", "missing") from error

    def _bytes(self, address: str, body: bytes | None = None, kind: str = "") -> bytes:
        for attempt in range(self._retries + 1):
            try:
                with self._open("GET" if body is None else "POST", address, body, kind) as reply:
                    content: bytes = reply.read()
                    return content
            except BusyError:
                if attempt == self._retries:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _open(
        self, method: str, address: str, body: Body | None = None, kind: str = "", size: int | None = None
    ) -> Any:
        headers = dict(self._headers)
        if kind:
            headers["Content-Type"] = kind
        if size is not None:
            headers["Content-Length"] = str(size)
        request = urllib.request.Request(self.address + address, body, headers, method=method)
        try:
            return self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise _explained(error.code, error.read(1 << 16)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InvalidInput(
                f"{self.address}: no answer ({reason}); is vlm serve running there?"
            ) from error


def _explained(status: int, content: bytes) -> VlmError:
    """Return the error that an answer tells of."""
    try:
        told = json.loads(content)["error"]
        code, message = str(told["code"]), str(told["message"])
    except (ValueError, LookupError, TypeError):
        code, message = "unexpected", f"the server answered {status}"
    if status == 503:
        return BusyError(message)
    if code == "capability":
        return CapabilityError(message)
    if status == 422:
        return DataError(message, code)
    return InvalidInput(message) if status < 500 else VlmError(message)


def _object(content: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(content)
    return value


def _hits(page: dict[str, Any]) -> list[Hit]:
    return [Hit.from_json(hit) for hit in page["hits"]]
