"""Where compiled kernels are kept: one private folder, checksummed entries, one builder of each at a time.

Code is loaded from here into the process, so a folder or an entry that somebody else could have written is
not used. Losing the folder costs a compilation and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "VLM_CACHE_DIR"
# part of every key: raise it when entries are written differently, so that two versions never fight over one
_FORMAT = b"2"


class NoCacheFolder(Exception):
    """No folder is private and writable; the message says what to do."""


def folder() -> Path:
    """Return a folder that belongs to this user alone and is writable; it is made if need be.

    Raises:
        NoCacheFolder: There is none.
    """
    root = os.environ.get(VARIABLE)
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"
    temporary = Path(tempfile.gettempdir()) / f"vlm-{os.getuid()}"
    for place in (base / "kernels", temporary / "kernels"):
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        state = place.stat()
        if os.access(place, os.W_OK) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
            return place
    raise NoCacheFolder(f"no private writable cache folder; set {VARIABLE} to one")


def key(*parts: bytes) -> str:
    """Return the name of what was made from ``parts``."""
    sizes = b"".join(len(part).to_bytes(8, "little") for part in parts)
    return hashlib.sha256(b"".join((_FORMAT, sizes, *parts))).hexdigest()[:20]


def read(target: Path) -> bytes | None:
    """Return an entry's content, or None if it is missing, torn, or was written under another name."""
    try:
        content = target.read_bytes()
        wanted = digest_path(target).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return content if _digest(target.name, content) == wanted else None


def entry(target: Path, build: Callable[[Path], Path]) -> bytes:
    """Return an entry's content, building it first if it is missing or damaged.

    Of many threads and processes that ask at once, one builds and the others wait for it.

    Args:
        target: Where the entry lies, inside ``folder()``.
        build: Is given an empty folder that goes away afterwards; makes a file in it and returns its path.

    Raises:
        OSError: The file system does not serve: full, read-only, without locks.
    """
    if (content := read(target)) is not None:
        return content
    with _lock(target.with_name(f"{target.name}.lock")):
        # another process may have built it while this one waited
        if (content := read(target)) is not None:
            return content
        prefix = f"{target.name}.work-"
        # left by a builder that was killed: whoever holds the lock is alone with them
        for left in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as name:
            built = build(Path(name))
            content = built.read_bytes()
            digest = Path(name) / "digest"
            digest.write_text(_digest(target.name, content) + "\n")
            # between the two moves the checksum does not match: that reads as damaged, never as good
            digest.replace(digest_path(target))
            built.replace(target)
        return content


def digest_path(target: Path) -> Path:
    """Return where an entry's checksum is written."""
    return target.with_suffix(".sha256")


def _digest(name: str, content: bytes) -> str:
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
