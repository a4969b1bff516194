"""The child process that opens videos and pictures for viewers: jobs on standard input, answers on output.

Run as ``python -m vlm.serving.media.worker``. A job is one line of JSON with a ``kind``, an answer is one
line of JSON. Files are what a job names and nothing else; the process kills itself (SIGALRM) when a job
takes too long, and has bounded memory and file sizes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_MEMORY_BYTES = 4 << 30
_FILE_BYTES = 1 << 30


def main() -> int:
    """Serve jobs until standard input ends."""
    # own the pipe: anything a library prints must not end up between the answers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    from vlm.data.decoding.image import read_image  # before memory is limited
    from vlm.errors import DataError
    from vlm.serving.media.clips import cut, describe
    from vlm.serving.media.pictures import save_strip

    def picture(job: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        pixels = read_image(Path(job["path"]))
        with open(job["out"], "wb") as file:
            np.save(file, pixels)
        return {}

    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "picture": picture,
        "describe": lambda job: describe(job["path"]),
        "strip": lambda job: save_strip(job["path"], job["times_s"], job["width"], Path(job["out"])),
        "cut": lambda job: cut(job["path"], job["start_s"], job["end_s"], Path(job["out"]), job["how"]),
    }
    _limit_resources()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, float(job["patience_s"]))
        answer: dict[str, Any]
        try:
            answer = {"result": kinds[job["kind"]](job)}
        except DataError as error:
            answer = {"reason": error.reason, "detail": str(error)}
        except MemoryError:
            answer = {"reason": "too_large", "detail": f"{job['path']}: needs too much memory"}
        except Exception as error:  # one odd file must not end the others
            answer = {"reason": "undecodable", "detail": f"{job['path']}: {type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _limit_resources() -> None:
    """Bound what a hostile file may take; where the system refuses, work goes on without the bound."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    with suppress(ValueError, OSError), open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY_BYTES, hard))


if __name__ == "__main__":
    sys.exit(main())
