"""Where the files that are not Python modules lie: kernels, configs, data tools, evaluation programs."""

from __future__ import annotations

import os
import sys
from pathlib import Path, PurePosixPath

from vlm.errors import InvalidInput

_PACKAGE = Path(__file__).resolve().parent


def asset(path: str) -> Path:
    """Return the absolute path of a shipped file or folder, in an installation and in a checkout alike.

    Args:
        path: Path relative to the project's root, for example ``configs/train/digits.yaml``.

    Raises:
        InvalidInput: Nothing of that name was shipped, or the path leaves the shipped folders.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise InvalidInput(
            f"expected the path of a shipped file, such as configs/train/digits.yaml, got {path!r}"
        )
    found = _root().joinpath(*parts)
    if not found.exists():
        raise InvalidInput(f"no shipped file {path!r} in {_root()}")
    return found


def user_folder() -> Path:
    """Return where what this user fetched lies: ``VLM_HOME``, else a folder of the platform's cache.

    The folder may not exist yet.
    """
    named = os.environ.get("VLM_HOME")
    if named:
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vlm"
    cache = os.environ.get("XDG_CACHE_HOME" if sys.platform != "win32" else "LOCALAPPDATA")
    return (Path(cache) if cache else Path.home() / ".cache") / "vlm"


def _root() -> Path:
    """Return ``vlm/share`` of an installation, else the checkout's root (never both: no file can shadow)."""
    share = _PACKAGE / "share"
    return share if share.is_dir() else _PACKAGE.parent
