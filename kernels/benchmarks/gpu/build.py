"""The build of the published extensions, in a process of its own beside whatever else runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BUILDER = Path(__file__).resolve().parents[1] / "build_official.py"
SECONDS = 180.0


class Build:
    """A build that has begun.

    Args:
        sources: Folder of the unpacked releases.
        into: Where the two modules go.
        architecture: What to compile for.
        seconds: Time allowed from now on.
    """

    def __init__(self, sources: Path, into: Path, architecture: str, seconds: float = SECONDS) -> None:
        self.into = into
        self._end = time.perf_counter() + seconds
        words = [str(sources), str(into), "--seconds", str(seconds), "--arch", architecture]
        into.mkdir(parents=True, exist_ok=True)
        self._log = into / "build.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(BUILDER), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> str:
        """Return why there are no modules, or an empty string; a build that takes longer is ended."""
        try:
            code = self._process.wait(min(seconds, max(self._end - time.perf_counter(), 0.0)))
        except subprocess.TimeoutExpired:
            self.stop()
            return "not built: time is up"
        return "" if code == 0 else self._log.read_text(errors="replace").strip()[-2000:]

    def stop(self) -> None:
        """End it and the compilers that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
