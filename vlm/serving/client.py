"""A served index from Python, with nothing but the standard library."""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import IO, Any, Literal, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from vlm.errors import BusyError, CapabilityError, DataError, InvalidInput, VlmError
from vlm.retrieval.queries.values import Mix, Moment, Part
from vlm.types import Answer, Hit, Segment

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
_CHUNK_BYTES = 1 << 20
Result = TypeVar("Result")
Taken = TypeVar("Taken")


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it would carry the token elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Patient(HTTPConnection):
    """Reads what a server answers before it has taken all of a body: that it is busy, for example."""

    def request(self, *arguments: Any, **named: Any) -> None:
        self.connect()  # who was never reached answers nothing
        with suppress(BrokenPipeError, ConnectionResetError):
            super().request(*arguments, **named)


class _PatientSafe(_Patient, HTTPSConnection):
    """The same over TLS."""


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Patient, request)


class _Safe(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_PatientSafe, request)


class Client:
    """Searches an index that `vlm serve` serves; its hits equal those of a `Searcher` over that index.

    Args:
        address: Such as ``http://127.0.0.1:8000``.
        token: What the server wants presented, if it does.
        timeout_s: Longest wait for an answer.
        retries: How often to come back when the server is busy, whatever it was asked.

    Raises:
        InvalidInput: The address is none. All methods raise it, too, for what the server cannot use, or if no
            server answers, or not to the end, or something else than `vlm serve` does; DataError for files
            that cannot be read, CapabilityError for what its model cannot do, and BusyError while it is busy.
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
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), _StayHere(), _Plain(), _Safe()
        )

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
            return self._taken(self._post("/api/search", {**values, "text": query}), _hits)
        if rerank or min_strength is not None or words:
            raise CapabilityError("only searches by one text can be reranked, graded, or look at words")
        if isinstance(query, os.PathLike):
            return self._taken(
                self._post("/api/search", {**values, "query_id": self._uploaded(Path(query))}), _hits
            )
        parts = query.parts if isinstance(query, Mix) else (Part(query),)
        return self._taken(
            self._post("/api/search", {**values, "parts": [self._part(part) for part in parts]}), _hits
        )

    def _uploaded(self, path: Path) -> str:
        """Return the name that the server gives to a file's query."""
        kind = "image" if path.suffix.lower() in _IMAGE_SUFFIXES else "video"
        reply = self._object("POST", f"/api/search/{kind}?top_k=1", path, f"{kind}/*")
        return self._taken(reply, _query_id)

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
        return self._taken(self._post("/api/similar", {**values, "where": where}), _hits)

    def ask(
        self, question: str, choices: Sequence[str] | None = None, *, video_id: str | None = None
    ) -> list[Answer]:
        """Return the choices, best first, with the moment they were judged on.

        Without choices, the one answer has no text, only that moment.
        """
        values = {"question": question, "choices": None if choices is None else list(choices)}
        return self._taken(self._post("/api/ask", {**values, "video_id": video_id}), _answers)

    def star(self, query: str, moment: Hit | Segment) -> dict[str, Any]:
        """Keep a text with the moment that it should find, for `vlm index check`; return the row.

        The server must have been started with ``--queries``; the same twice is one row.
        """
        values = {"text": query, "video_id": moment.video_id, "start_s": moment.start_s}
        return self._post("/api/queries", {**values, "end_s": moment.end_s})

    def starred(self) -> list[dict[str, Any]]:
        """Return the rows that `star` and people wrote; `video_id` is None if it left the index."""
        return self._taken(self._get("/api/queries"), lambda reply: list(reply["queries"]))

    def unstar(self, key: str) -> dict[str, Any]:
        """Take out the row of that `key`, and return it."""
        return self._object("DELETE", f"/api/queries/{quote(key, safe='')}")

    def info(self) -> dict[str, Any]:
        """Return what the index holds and what its model can do."""
        return self._get("/api/info")

    def video(self, video_id: str) -> dict[str, Any]:
        """Return what a video is."""
        return self._get(f"/api/videos/{quote(video_id, safe='')}")

    def thumbnail(self, video_id: str, at_s: float = 0.0, *, width: int = 320) -> bytes:
        """Return the frame at a time as a JPEG; the width is 160, 320 or 640 pixels."""
        words = urlencode({"at_s": at_s, "width": width})
        return self._ask("GET", f"/api/videos/{quote(video_id, safe='')}/thumbnail?{words}", self._read)

    def download(self, video_id: str, path: str | os.PathLike[str]) -> int:
        """Write a video's file to a new file here, and return its size in bytes.

        Until all of it is there it has another name, ``.vlm-….part``, beside the new file.

        Raises:
            FileExistsError: Something lies there already.
            OSError: Nothing can be written there.
        """
        place = Path(path)
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        address = f"/api/videos/{quote(video_id, safe='')}/content"
        return self._ask("GET", address, lambda reply: self._save(reply, place))

    def _save(self, reply: HTTPResponse, place: Path) -> int:
        announced, size = reply.length, 0
        temporary = place.with_name(f".vlm-{secrets.token_hex(8)}.part")
        try:
            with temporary.open("xb") as file:
                while piece := self._read(reply, _CHUNK_BYTES):
                    size += file.write(piece)
                # read in pieces, a body that is cut looks like one that ended
                if announced is not None and size != announced:
                    raise InvalidInput(
                        f"{self.address}: the file broke off after {size} of {announced} bytes; try again"
                    )
                file.flush()
                os.fsync(file.fileno())
            _name_anew(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
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
        while self._taken(job := self.job(job_id), lambda reply: reply["state"] == "running"):
            if time.monotonic() > end:
                raise BusyError(f"job {job_id} still runs after {timeout_s:g} s")
            time.sleep(every_s)
        return job

    def _get(self, address: str) -> dict[str, Any]:
        return self._object("GET", address)

    def _post(self, address: str, values: dict[str, Any]) -> dict[str, Any]:
        return self._object("POST", address, json.dumps(values).encode(), "application/json")

    def _object(
        self, method: str, address: str, body: bytes | Path | None = None, kind: str = ""
    ) -> dict[str, Any]:
        content = self._ask(method, address, self._read, body, kind)
        try:
            value = json.loads(content)
        except ValueError as error:
            raise InvalidInput(
                f"{self.address}: the answer is no JSON ({error}); is it vlm serve that runs there?"
            ) from error
        if not isinstance(value, dict):
            raise InvalidInput(
                f"{self.address}: expected a JSON object, got {type(value).__name__}; is it vlm serve that "
                "runs there?"
            )
        return value

    def _taken(self, reply: dict[str, Any], take: Callable[[dict[str, Any]], Taken]) -> Taken:
        """Return what `take` makes of a reply that should have a certain shape."""
        try:
            return take(reply)
        except (LookupError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"{self.address}: the answer is not what this client knows ({error!r}); are server and "
                "client of one version?"
            ) from error

    def _ask(
        self,
        method: str,
        address: str,
        use: Callable[[HTTPResponse], Result],
        body: bytes | Path | None = None,
        kind: str = "",
    ) -> Result:
        """Return what `use` makes of the answer; while the server is busy, send all of it again."""
        for attempt in range(self._retries + 1):
            try:
                with (
                    _opened(body) as (content, size),
                    self._open(method, address, content, kind, size) as reply,
                ):
                    return use(reply)
            except BusyError:
                if attempt == self._retries:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _read(self, reply: HTTPResponse, most: int | None = None) -> bytes:
        try:
            return reply.read(most)
        except (HTTPException, OSError, ValueError) as error:
            raise InvalidInput(f"{self.address}: the answer broke off ({error}); try again") from error

    def _open(
        self, method: str, address: str, body: bytes | IO[bytes] | None, kind: str, size: int | None
    ) -> HTTPResponse:
        headers = dict(self._headers)
        if kind:
            headers["Content-Type"] = kind
        if size is not None:
            headers["Content-Length"] = str(size)
        request = urllib.request.Request(self.address + address, body, headers, method=method)
        try:
            reply: HTTPResponse = self._opener.open(request, timeout=self._timeout_s)
            return reply
        except urllib.error.HTTPError as error:
            with error:
                raise _explained(error) from None
        except (HTTPException, OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error)).strip()
            raise InvalidInput(
                f"{self.address}: no answer ({reason}); is vlm serve running there?"
            ) from error


@contextmanager
def _opened(body: bytes | Path | None) -> Iterator[tuple[bytes | IO[bytes] | None, int | None]]:
    """Give what is sent, from its beginning, and the size of a file."""
    if not isinstance(body, Path):
        yield body, None
        return
    try:
        # of a pipe there would be no size, and opening it could take for ever
        if body.exists() and not body.is_file():
            raise DataError(f"{body}: expected a picture or video file, this is none", "not_a_file")
        file = body.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{body}: no such file", "missing") from error
    except OSError as error:
        raise DataError(f"{body}: cannot be read ({error.strerror})") from error
    with file:
        yield file, os.fstat(file.fileno()).st_size


def _name_anew(temporary: Path, place: Path) -> None:
    """Give a file its name, unless something has that by now."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without a second name for a file
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        temporary.replace(place)


def _explained(answer: urllib.error.HTTPError) -> VlmError:
    """Return the error that an answer tells of; its status counts even if the rest is cut."""
    status = answer.code
    try:
        told = json.loads(answer.read(1 << 16))["error"]
        code, message = str(told["code"]), str(told["message"])
    except (HTTPException, OSError, ValueError, LookupError, TypeError):
        code, message = "unexpected", f"the server answered {status}"
    if status == 503:
        return BusyError(message)
    if code == "capability":
        return CapabilityError(message)
    if status == 422:
        return DataError(message, code)
    return InvalidInput(message) if status < 500 else VlmError(message)


def _query_id(page: dict[str, Any]) -> str:
    name = page["query_id"]
    if not isinstance(name, str):
        raise TypeError(f"query_id is {name!r}")
    return name


def _answers(reply: dict[str, Any]) -> list[Answer]:
    hit = Hit.from_json(reply["evidence"])
    segment = Segment(video_id=hit.video_id, path=hit.path, start_s=hit.start_s, end_s=hit.end_s)
    choices = reply["choices"] or [{"text": "", "score": hit.score}]
    return [Answer(text=c["text"], score=c["score"], evidence=(segment,)) for c in choices]


def _hits(page: dict[str, Any]) -> list[Hit]:
    return [Hit.from_json(hit) for hit in page["hits"]]
