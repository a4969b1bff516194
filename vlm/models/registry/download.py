"""Fetch published files: resumed, verified, put in place in one step; never without being asked to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, Any

from vlm import __version__
from vlm.errors import BusyError, IntegrityError, InvalidInput, NoSpaceError
from vlm.models.registry.entries import ModelEntry, ModelFile
from vlm.models.registry.store import (
    LocalModel,
    add_file,
    check_size,
    local_model,
    pin,
    pinned_sha256,
    store_folder,
    verify,
)
from vlm.progress import progress_bar

_TIMEOUT_SECONDS = 30.0
_BLOCK_BYTES = 1 << 18
_TRIES_WITHOUT_PROGRESS = 3
_SECONDS_BETWEEN_TRIES = 0.5
_OFFLINE_VARIABLES = ("VLM_OFFLINE", "HF_HUB_OFFLINE")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def offline_reason() -> str | None:
    """Return which environment variable forbids the network, or None."""
    set_to = {name: os.environ.get(name, "") for name in _OFFLINE_VARIABLES}
    return next(
        (f"{name}={value}" for name, value in set_to.items() if value.upper() in ("1", "ON", "YES", "TRUE")),
        None,
    )


def download_model(name: str, entry: ModelEntry) -> tuple[LocalModel, dict[str, str]]:
    """Fetch the files of a model that are not here yet.

    Args:
        name: The model's name in the registry.
        entry: Its entry.

    Returns:
        The model, and file name → sha256 of the files that had no published hash and were pinned now.

    Raises:
        InvalidInput: Offline, or the server does not have the file.
        BusyError: The connection broke or the server is overloaded; what came is kept for the next try.
        IntegrityError: Size or hash are wrong; the file is thrown away.
        NoSpaceError: The disk is full; what came is kept.
    """
    pinned = {}
    for file in entry.files:
        target = store_folder() / name / file.name
        expected = pinned_sha256(file)
        if not _is_here(target, file, expected):
            expected = _download(file, target, name) or expected
        sha256 = _verify_or_discard(target, file, expected)
        if pin(file, sha256):
            pinned[file.name] = sha256
        add_file(name, entry, file, target, sha256)
    return local_model(name), pinned


def _is_here(target: Path, file: ModelFile, sha256: str | None) -> bool:
    """Whether a file of the right size and, where one is known, hash is in place."""
    if not target.is_file():
        return False
    try:
        verify(target, file, sha256)
    except IntegrityError:
        target.unlink()
        return False
    return True


def _verify_or_discard(path: Path, file: ModelFile, sha256: str | None) -> str:
    try:
        return verify(path, file, sha256)
    except IntegrityError as error:
        path.unlink()
        raise IntegrityError(f"{error}; it was deleted, pull it again") from None


def _download(file: ModelFile, target: Path, name: str) -> str | None:
    """Fetch one file into place; return the hash that the hub states for it, if any."""
    reason = offline_reason()
    if reason is not None:
        raise InvalidInput(
            f"{file.name} is not here and {reason} forbids the network: unset it, or fetch {file.url} "
            f"on another machine and run: vlm models import {file.name} --name {name}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    with _locked(partial) as stream:
        stated = _Transfer(file, stream).run()
        expected = pinned_sha256(file) or stated
        _verify_or_discard(partial, file, expected)
        os.fsync(stream.fileno())
        os.replace(partial, target)
        _tag_path(partial).unlink(missing_ok=True)
    return stated


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """Open the unfinished file for one process only."""
    with partial.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{partial.name}: another process is fetching it; wait for it to finish"
            ) from error
        yield stream


def _tag_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


@dataclass
class _Transfer:
    """One download, over as many connections as it takes."""

    file: ModelFile
    stream: IO[bytes]
    stated_sha256: str | None = None

    def run(self) -> str | None:
        """Append to the stream until it is complete."""
        tries, cause = 0, ""
        while tries < _TRIES_WITHOUT_PROGRESS:
            before = self._size()
            try:
                if self._receive():
                    return self.stated_sha256
                cause = "the connection was cut"
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                cause = str(error) or type(error).__name__
            except OSError as error:
                cause = self._explain(error)
            tries = 0 if self._size() > before else tries + 1
            time.sleep(_SECONDS_BETWEEN_TRIES * tries)
        raise BusyError(
            f"{self.file.name}: {tries} tries without progress at {self._size() / 1e6:.1f} of "
            f"{self.file.size_mb} MB ({cause}); run the same command again to go on"
        )

    def _receive(self) -> bool:
        """Take what one connection brings; return whether the file is complete."""
        with self._open() as response:
            start = self._start(response)
            if start is None:
                return False
            length = response.headers.get("Content-Length")
            total = start + int(length) if length is not None else None
            if total is not None:
                self._refuse_early(total, start)
            limit = total if total is not None else int(self.file.size_mb * 1.02e6) + 1
            with progress_bar(total, self.file.name, "B", initial=start, unit_scale=True) as bar:
                while self._size() < limit and (block := response.read(_BLOCK_BYTES)):
                    self.stream.write(block)
                    self.stream.flush()
                    bar.update(len(block))
        return self._size() == total if total is not None else True

    def _open(self) -> Any:
        headers = {"User-Agent": f"videomamba-vlm/{__version__}", "Accept-Encoding": "identity"}
        size, tag = self._size(), self._tag()
        if size and tag is None:
            self._restart()  # nobody knows which version the beginning belongs to
        elif size and tag is not None:
            headers |= {"Range": f"bytes={size}-", "If-Range": tag}
        opener = urllib.request.build_opener(_Redirects(self))
        return opener.open(urllib.request.Request(self.file.url, headers=headers), timeout=_TIMEOUT_SECONDS)

    def _start(self, response: Any) -> int | None:
        """Return at which byte the answer begins; None if the file must be fetched from the beginning."""
        size = self._size()
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if match and int(match[1]) == size:
                return size
            self._restart()
            return None
        self._restart()  # the server sends everything: it ignores ranges, or the file is another one now
        tag = response.headers.get("ETag", "")
        if tag and not tag.startswith("W/"):
            _tag_path(Path(self.stream.name)).write_text(tag, encoding="utf-8")
        return 0

    def _refuse_early(self, total: int, start: int) -> None:
        """Refuse before the transfer what could only fail after it."""
        check_size(self.file, total)
        free = shutil.disk_usage(Path(self.stream.name).parent).free
        if free < total - start:
            raise NoSpaceError(
                f"{self.stream.name}: needs {(total - start) / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
                "free some, or set VLM_HOME to a larger disk, and run again"
            )

    def _explain(self, error: OSError) -> str:
        """Raise ours instead, unless another try makes sense; return the cause in that case."""
        name = self.file.name
        if error.errno in _FULL:
            raise NoSpaceError(
                f"{self.stream.name}: no space left; free some and run again to go on"
            ) from error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._restart()
            elif error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise InvalidInput(f"{name}: {self.file.url} answers {error.code} {error.reason}") from error
        elif isinstance(error, urllib.error.URLError):
            if not isinstance(error.reason, (ConnectionResetError, TimeoutError)):
                raise InvalidInput(
                    f"{name}: cannot reach {self.file.url} ({error.reason}): check the network or set "
                    "VLM_MODELS_URL to a mirror; on a machine without network, use vlm models import"
                ) from error
        else:
            raise error
        return str(error)

    def _size(self) -> int:
        return os.fstat(self.stream.fileno()).st_size

    def _tag(self) -> str | None:
        try:
            return _tag_path(Path(self.stream.name)).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _restart(self) -> None:
        self.stream.truncate(0)
        _tag_path(Path(self.stream.name)).unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, keeps the hash that the hub states on the way, and never leaves HTTPS."""

    def __init__(self, transfer: _Transfer) -> None:
        self._transfer = transfer

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        stated = str(headers.get("X-Linked-ETag", "")).strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", stated):
            self._transfer.stated_sha256 = stated
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise InvalidInput(f"{req.full_url} redirects to {newurl}, which is not encrypted: refused")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
