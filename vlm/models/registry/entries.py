"""The pinned list of models in ``configs/models.yaml``, as typed values."""

from __future__ import annotations

import difflib
import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import Literal

from vlm.assets import asset
from vlm.config import load_config
from vlm.errors import InvalidInput

REGISTRY_PATH = "configs/models.yaml"
_DEFAULT_ENDPOINT = "https://huggingface.co"
_CAPABILITIES = ("search", "rerank", "choose", "answer", "when", "classify")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """One file of a published model.

    Attributes:
        role: ``weights``, or ``tokenizer`` (a ``tokenizer.json`` or a WordPiece ``vocab.txt``).
        repo: Owner and name on the model hub.
        revision: Commit or branch.
        file: Path in the repository.
        size_mb: Size in 10^6 bytes, rounded as published.
        size_bytes: Exact size, where it is published.
        sha256: Hash of the content, where it is published.
    """

    role: Literal["weights", "tokenizer"]
    repo: str
    revision: str
    file: str
    size_mb: float
    size_bytes: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        """Check what a typing error would turn into an unverifiable download."""
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 must be 64 lower-case hexadecimal digits, got {self.sha256!r}")
        if self.size_mb <= 0:
            raise ValueError(f"size_mb must be positive, got {self.size_mb}")

    @property
    def name(self) -> str:
        """The file's own name, without folders."""
        return self.file.rpartition("/")[2]

    @property
    def url(self) -> str:
        """Where to fetch it: under ``VLM_MODELS_URL``, else ``HF_ENDPOINT``, else the public hub."""
        endpoint = os.environ.get("VLM_MODELS_URL") or os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
        parts = (self.repo, "resolve", self.revision, self.file)
        return "/".join((endpoint.rstrip("/"), *(urllib.parse.quote(part) for part in parts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedScore:
    """A result as its authors published it; not measured by this project."""

    measure: str
    value: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """A model known by name.

    Attributes:
        summary: One line on what it is.
        kind: ``folder`` (a model folder that is shipped), ``official`` (a VideoMamba file) or ``open_clip``.
        licence: SPDX identifier.
        domain: ``open``, or the narrow world that it knows.
        capabilities: A subset of ``search``, ``rerank``, ``choose``, ``answer``, ``when``, ``classify``.
        files: What to fetch; empty for a shipped model.
        path: Where a shipped model lies, relative to the project's root.
        architecture: Name of the architecture in open_clip.
        pretrained: Tag of the weights in open_clip.
        published: One published score, for orientation.
    """

    summary: str
    kind: Literal["folder", "official", "open_clip"]
    licence: str
    domain: str
    capabilities: tuple[str, ...]
    files: tuple[ModelFile, ...] = ()
    path: str | None = None
    architecture: str | None = None
    pretrained: str | None = None
    published: PublishedScore | None = None

    def __post_init__(self) -> None:
        """Check that the kind has what it needs."""
        unknown = sorted(set(self.capabilities) - set(_CAPABILITIES))
        if unknown:
            raise ValueError(f"unknown capabilities {unknown}; known: {', '.join(_CAPABILITIES)}")
        if (self.kind == "folder") != (self.path is not None) or (self.kind == "folder") == bool(self.files):
            raise ValueError("a model of kind 'folder' has a path and no files; the other kinds have files")
        if self.kind == "open_clip" and not (self.architecture and self.pretrained):
            raise ValueError("a model of kind 'open_clip' needs architecture and pretrained")

    @property
    def size_mb(self) -> float:
        """Size of the whole download in 10^6 bytes."""
        return sum(file.size_mb for file in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Registry:
    models: dict[str, ModelEntry]


def load_registry() -> dict[str, ModelEntry]:
    """Return name → entry of every model that this project knows, in the order of the file."""
    return load_config(_Registry, asset(REGISTRY_PATH)).models


def lookup(name: str) -> ModelEntry:
    """Return the entry of one model.

    Raises:
        InvalidInput: No model has that name; the nearest is named.
    """
    models = load_registry()
    if name not in models:
        near = difflib.get_close_matches(name, models, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(models)}"
        raise InvalidInput(f"no model is named {name!r}; {hint}")
    return models[name]
