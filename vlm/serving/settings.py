"""How an index is served: where, to whom, and what a request may cost."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from vlm.errors import InvalidInput

_SHORTEST_TOKEN = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What requests may cost; beyond it they are refused before they cost more.

    Attributes:
        max_top_k: Hits that a search may reach, the pages before included.
        max_rerank: Segments that may be scored again.
        max_text: Characters of a text or question.
        max_where: Characters of a filter.
        max_choices: Answers to choose from.
        max_known: Rows that the file of known items may grow to.
        max_json_bytes: Size of a JSON body.
        max_image_bytes: Size of an uploaded picture.
        max_video_bytes: Size of an uploaded video.
        max_uploads: Uploads at the same time.
        max_clip_s: Seconds of video that may be prepared for playing at once.
        num_searches: Searches at the same time, which share passes over the vectors; two where they cannot.
        num_decoders: Uploaded videos, and moments that answer questions, that are decoded at the same time.
        num_media_workers: Processes that decode and encode for viewers.
        max_waiting: Requests in line for each of these.
        max_wait_s: Longest wait in line for the model, and for the vectors, that a search may have to expect.
        timeout_s: Longest time that a request may wait and work.
        media_timeout_s: The same for a clip that must be encoded.
        body_timeout_s: Longest pause between two pieces of a body; also the longest wait for a header.
    """

    max_top_k: int = 1000
    max_rerank: int = 1000
    max_text: int = 2000
    max_where: int = 1500
    max_choices: int = 50
    max_known: int = 10_000
    max_json_bytes: int = 1 << 20
    max_image_bytes: int = 32 << 20
    max_video_bytes: int = 512 << 20
    max_uploads: int = 4
    max_clip_s: float = 120.0
    num_searches: int = 32
    num_decoders: int = 2
    num_media_workers: int = max(1, min(4, (os.cpu_count() or 1) // 2))
    max_waiting: int = 64
    max_wait_s: float = 1.0
    timeout_s: float = 30.0
    media_timeout_s: float = 60.0
    body_timeout_s: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSettings:
    """Where an index is served, and to whom.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 lets the system choose.
        token: What clients must present, or None.
        allow_no_token: Listen on other addresses than this machine's own without a token.
        allowed_hosts: Names, besides addresses, under which browsers may reach the service.
        ingest_folders: Name → folder that clients may have indexed.
        queries_file: Where starred hits are kept as known items; None keeps none.
        allow_narrow_model: Index ordinary videos with a model that does not know them.
        cache_folder: Where pictures and clips are kept.
        cache_bytes: How much of them.
        limits: What requests may cost.

    Raises:
        InvalidInput: The service would be open to the network without a token, or the token is too short.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    allow_no_token: bool = False
    allowed_hosts: tuple[str, ...] = ()
    ingest_folders: dict[str, Path] = field(default_factory=dict)
    queries_file: Path | None = None
    allow_narrow_model: bool = False
    cache_folder: Path
    cache_bytes: int = 1 << 30
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < _SHORTEST_TOKEN:
            raise InvalidInput(
                f"the token has {len(self.token)} characters, expected at least {_SHORTEST_TOKEN}; make one "
                "with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        if self.token is None and not self.allow_no_token and not is_loopback(self.host):
            raise InvalidInput(
                f"{self.host} can be reached from other machines, so clients need a token: add --token-file "
                "FILE, or --allow-no-token if everybody there may read these videos"
            )


def is_loopback(host: str) -> bool:
    """Whether an address, or the name ``localhost``, can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
