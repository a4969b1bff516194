"""Where BERT's vocabulary comes from when a published weights file brings none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vlm.errors import InvalidInput
from vlm.text.tokenizer import Tokenizer

REPOSITORY, REVISION, FILE = (
    "google-bert/bert-base-uncased",
    "86b5e0934494bd15c9632b12f734a8a67f723594",
    "vocab.txt",
)
ALIASES = (REPOSITORY, "bert-base-uncased")


def bert_tokenizer() -> Tokenizer:
    """Return the tokenizer of ``bert-base-uncased``: the local Hugging Face cache first, then the hub.

    A download (0.2 MB) is announced on stderr; offline mode (``HF_HUB_OFFLINE=1``) is honoured.

    Raises:
        InvalidInput: It is in neither; the message names both ways out.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise InvalidInput(_message("huggingface_hub is not installed")) from error
    cached = cached_vocabulary()
    if cached is not None:
        return Tokenizer.from_file(cached)
    print(f"downloading {REPOSITORY}/{FILE} (0.2 MB, Apache-2.0)", file=sys.stderr)  # noqa: T201
    try:
        path = hf_hub_download(REPOSITORY, FILE, revision=REVISION)
    except Exception as error:  # offline, unreachable, full disk: the way out is the same
        raise InvalidInput(_message(f"{type(error).__name__}: {error}")) from error
    return Tokenizer.from_file(path)


def cached_vocabulary() -> Path | None:
    """Return where the local Hugging Face cache has it, None if nowhere."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository in ALIASES:
        for name in ("tokenizer.json", FILE):
            cached = try_to_load_from_cache(repository, name)
            if isinstance(cached, str) and os.path.exists(cached):
                return Path(cached)
    return None


def _message(reason: str) -> str:
    return (
        "this model needs BERT's vocabulary: give --tokenizer PATH (a vocab.txt or tokenizer.json), or put "
        f"{REPOSITORY} into the Hugging Face cache ({reason.splitlines()[0]})"
    )
