"""Where the files that are not Python modules lie: kernels, configs, data tools, evaluation programs."""

from __future__ import annotations

from pathlib import Path

from vlm.errors import InvalidInput

_PACKAGE = Path(__file__).resolve().parent


def asset(path: str) -> Path:
    """Return the absolute path of a shipped file or folder, in an installation and in a checkout alike.

    Args:
        path: Path relative to the project's root, for example ``configs/train/demo.yaml``.

    Raises:
        InvalidInput: Neither the installation nor the checkout holds it.
    """
    candidates = (_PACKAGE / "share" / path, _PACKAGE.parent / path)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise InvalidInput(f"no shipped file {path!r}; looked at {' and '.join(map(str, candidates))}")
